"""The application with all commands, and the conversion of errors to messages and exit codes."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sylva_ray.cli.bytes import traffic
from sylva_ray.cli.catalogue import init, list_names, show
from sylva_ray.cli.cluster import cluster
from sylva_ray.cli.compare import compare
from sylva_ray.cli.evaluate import evaluate
from sylva_ray.cli.export import export
from sylva_ray.cli.pretrain import pretrain
from sylva_ray.cli.repair import repair
from sylva_ray.cli.report import report
from sylva_ray.cli.run import run
from sylva_ray.cli.track import track
from sylva_ray.cli.tune import tune
from sylva_ray.cli.version import version
from sylva_ray.core.errors import RunError, UserError, error_line

INTERRUPTED = 130
"""The exit code after Ctrl-C; which of an exception and a returned code tells of it depends on the version of typer."""

MOST_KEYS = 3
"""Keys of settings that a message suggests."""


class Commands(TyperGroup):
    """A group of commands that prints every error as one line on standard error and sets the exit code."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Parse the arguments, run the command, and exit."""
        try:
            code = super().main(*args, **options | {"standalone_mode": False})
        except UserError as error:
            from sylva_ray import api

            words = options.get("args") or args[:1] or sys.argv[1:]
            more = "" if "pretrain" in words[:1] else api.where_to_read(error.key)  # `show` knows experiments only
            _fail(f"{error}{more}", error.exit_code)
        except RunError as error:
            _fail(str(error), error.exit_code)
        except OSError as error:
            _fail(f"{error.filename or 'file system'}: {error.strerror or error}", 1)
        except typer.Abort:
            code = INTERRUPTED
        except Exception as error:  # usage errors of typer have a method that formats their message
            if hasattr(error, "format_message"):
                _fail(_in_our_words(error.format_message()) + _what_there_is(error), 2)
            raise
        if code == INTERRUPTED:  # no error of ours, which would say how to resume
            _fail("interrupted: nothing was begun that can be resumed; the same command starts again", INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _in_our_words(message: str) -> str:
    """Return a message about an option without the words of the library that checked its type."""
    return re.sub(", unable to parse.*$", "", message.replace("Value error, ", "").replace("Input should", "must"))


def _what_there_is(error: Any) -> str:
    """Return the commands, where an unknown one was given, or how to write a setting that was given as an option."""
    context, name = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if context is None:
        return ""
    if isinstance(context.command, TyperGroup) and "command" in error.format_message():
        return f" Commands: {', '.join(context.command.list_commands(context))}"
    if name is None or all(parameter.name != "overrides" for parameter in context.command.params):
        return ""
    from sylva_ray import api

    word = name.lstrip("-").replace("-", "_")
    keys = [] if context.command.name == "pretrain" else api.setting_keys(word)[:MOST_KEYS]  # of experiments only
    if not keys:
        return "" if getattr(error, "possibilities", None) else "; settings are written KEY=VALUE"
    return f"; settings are written KEY=VALUE: {' or '.join(f'{key}=...' for key in keys)}"


def _fail(message: str, code: int) -> NoReturn:
    print(f"sylva-ray: {error_line(message)}", file=sys.stderr)
    sys.exit(code)


app = typer.Typer(
    name="sylva-ray",
    cls=Commands,
    help="Personal adversarial defences for a fleet of edge clients, simulated on Ray.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Personal adversarial defences for a fleet of edge clients, simulated on Ray."""
    if show_version:
        version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


EXAMPLES = {
    "list": "sylva-ray list methods",
    "show": "sylva-ray show attack.epsilon",
    "init": "sylva-ray init my_study --recipe digits",
    "run": "sylva-ray run digits training.rounds=5 --out runs/five",
    "tune": "sylva-ray tune grid --out runs/sweep",
    "evaluate": "sylva-ray evaluate runs/five --suite standard --checks",
    "report": "sylva-ray report runs/five",
    "track": "sylva-ray track runs/five",
    "compare": "sylva-ray compare runs/five runs/ten --out compare.html",
    "export": "sylva-ray export runs/five --to adapters",
    "pretrain": "sylva-ray pretrain pretrain_tiny_imagenet",
    "repair": "sylva-ray repair runs/five",
    "bytes": "sylva-ray bytes --rank 8 --rank 16 --num-classes 100",
    "version": "sylva-ray version",
}
"""What the help of every command ends with."""

COMMANDS = (
    list_names,
    show,
    init,
    run,
    tune,
    evaluate,
    report,
    track,
    compare,
    export,
    pretrain,
    repair,
    traffic,
    version,
)
RENAMED = {traffic: "bytes", list_names: "list"}
"""Commands that are not called like their function."""

for command in COMMANDS:
    name = RENAMED.get(command, command.__name__)
    app.command(name=name, epilog=f"Example: {EXAMPLES[name]}")(command)
app.add_typer(cluster, name="cluster")


def main() -> None:
    """Run the command line; the entry point of ``sylva-ray``."""
    app(prog_name="sylva-ray")

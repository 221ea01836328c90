"""The command line. Wrong input: one line that names key, value and what is allowed, exit code 2, nothing written.
A failure while running: one line and the command that resumes, exit code 1. Ctrl-C leaves a resumable run (130)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from sylva_ray import __version__
from sylva_ray.config.experiment import OFFLINE_BACKBONE, BackboneSection, LoraSection, load_config, load_run_config
from sylva_ray.core.errors import Interrupted, RunError, Stopped, UserError

if TYPE_CHECKING:
    from sylva_ray.storage.remote_copy import RemoteFolder

app = typer.Typer(
    name="sylva-ray",
    help="Personal adversarial defences for a fleet of edge clients, simulated on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MIN_WIDTH = 100
"""Columns that our tables need; a pipe or a log has no width of its own."""

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted keys, e.g. training.rounds=5")
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or its URL")]


@app.command()
def run(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="a YAML file, or a run folder (or URL) with --resume")
    ],
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option(help="run folder, or a URL such as s3://... (default: runs/NAME-TIME)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="only the closing table")] = False,
) -> None:
    """Run one experiment: both phases, evaluation, report."""
    from sylva_ray.execution.ray.driver import run_prepared
    from sylva_ray.observers.mlflow.tracker import tracking_uri
    from sylva_ray.preparation.experiment import prepare
    from sylva_ray.reports.terminal import RunDisplay, closing_lines, closing_table
    from sylva_ray.storage.remote_copy import is_url

    its_own = is_url(config) or Path(config).is_dir()  # the config that lies in the run folder
    if its_own:
        out = out or config
    elif resume and out is None:
        raise UserError("--resume", config, "needs --out DIR (or the run folder in place of CONFIG)")
    experiment = None if its_own else load_config(config, overrides or [])
    where = out or f"runs/{experiment.name if experiment else ''}-{datetime.now():%Y%m%d-%H%M%S}"
    console = _console()
    with _run_folder(where, "resume" if resume else "start") as (run_dir, remote):
        experiment = experiment or load_run_config(run_dir, overrides or [])
        prepared = prepare(experiment, run_dir)
        with (
            RunDisplay(console, quiet) as display,
            _resumable(run_dir / "config.yaml", f"Resume with: sylva-ray run {where} --resume"),
        ):
            summary = run_prepared(prepared, run_dir, resume, display.on_event, remote)
    console.print(closing_table(summary))
    uri = tracking_uri(experiment.tracking, run_dir) if experiment.tracking.enabled else None
    for line in closing_lines(summary, where, uri):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def tune(
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="a YAML file, or a sweep's folder with --resume")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="sweep folder (default: runs/NAME-TIME)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the trials that have not finished")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="only the closing table")] = False,
) -> None:
    """Run a sweep of experiments on Ray Tune (docs/sweeps.md)."""
    from sylva_ray.sweeps.folder import SweepFolder
    from sylva_ray.sweeps.ray_tune import run_sweep
    from sylva_ray.sweeps.space import load_space
    from sylva_ray.sweeps.terminal import SweepDisplay, sweep_lines, sweep_table

    for name, path in (("SPACE", space), ("--out", out)):
        if path is not None and ":/" in str(path):
            raise UserError(name, str(path), "is a URL: a sweep's folder is a local or mounted one")
    if space.is_dir():
        if overrides or not resume:
            raise UserError(
                "SPACE", str(space), "is a folder: add --resume, without overrides, to go on with its sweep"
            )
        loaded, out = SweepFolder(space).load(), out or space
    else:
        loaded = load_space(space, overrides or [])
    if resume and out is None:
        raise UserError("--resume", str(space), "needs --out DIR (or the sweep's folder in place of SPACE)")
    sweep_dir = out or Path("runs") / f"{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}"
    console = _console()
    how = f"Resume with: sylva-ray tune {sweep_dir} --resume"
    with SweepDisplay(console, quiet) as display, _resumable(sweep_dir / "space.yaml", how):
        sweep = run_sweep(loaded, sweep_dir, resume, display.on_event)
    console.print(sweep_table(sweep))
    for line in sweep_lines(sweep, sweep_dir):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if sweep.failed:
        first = sweep.failed[0]
        what = f"{len(sweep.failed)} of {len(sweep.trials)} trials failed, the first ({first.key}): {first.error}"
        again = not loaded.remembers or any(trial.state == "failed" for trial in sweep.failed)
        raise RunError(f"{what}. Mend that, then: sylva-ray tune {sweep_dir} --resume" if again else what)


@app.command()
def evaluate(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="cluster.*, training.device, evaluation.precision only"),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME:key=value,...; may be given again, e.g. pgd:steps=100,restarts=5"),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="quick, standard (AutoAttack) or full")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="test images per client (default: the run's own)")] = None,
    epsilon: Annotated[
        str | None, typer.Option(help="of suites, curves and checks (default: the run's first attack's)")
    ] = None,
    checks: Annotated[bool, typer.Option("--checks", help="S1 to S14 (docs/checks.md)")] = False,
    curves: Annotated[bool, typer.Option("--curves", help="accuracy against epsilon and against steps")] = False,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="every client's model attacked through the others")
    ] = False,
    surrogate: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="attack through this run's models as well")
    ] = None,
    certify: Annotated[
        list[float] | None, typer.Option(metavar="SIGMA", help="randomised smoothing with this noise")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON (default: RUN/evaluation.json)")] = None,
) -> None:
    """Attack the trained, personal models of a run again, with anything; what was measured before is not measured twice."""
    from sylva_ray.evaluation.request import Extras, build_request
    from sylva_ray.evaluation.run import PARTS, assess, prepare_assessment, write_assessment
    from sylva_ray.execution.ray.driver import pool_for
    from sylva_ray.observers.mlflow.tracker import send_run
    from sylva_ray.reports.pages.run import write_report
    from sylva_ray.reports.terminal import AssessmentDisplay, assessment_tables

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError("--out", str(out), "is a folder" if out.is_dir() else "its folder does not exist")
    with ExitStack() as stack:
        run_dir, _ = stack.enter_context(_run_folder(run, "change"))
        others = [stack.enter_context(_run_folder(other, "read"))[0] for other in surrogate or []]
        assessment = prepare_assessment(run_dir, images, others, overrides or [])
        config, fleet = assessment.prepared.config, assessment.prepared.fleet
        request = build_request(
            config,
            attack or [],
            suite,
            epsilon,
            Extras(checks, curves, transfer or bool(surrogate), tuple(certify or ())),
            fleet.num_clients,
            fleet.num_classes,
        )
        console = _console()
        with (
            AssessmentDisplay(console) as display,
            _resumable(run_dir / PARTS, "What was measured is kept: the same command goes on from there"),
            pool_for(assessment.prepared, display.on_lost, display.on_waiting) as pool,
        ):
            found = assess(assessment, request, pool, display.on_event)
        path = write_assessment(run_dir, found, out)
        for table in assessment_tables(found):
            console.print(table)
        typer.echo(path)
        if out is None:
            typer.echo(write_report(run_dir))
            if config.tracking.enabled:
                for problem in send_run(run_dir, config):
                    typer.echo(f"warning: {problem}", err=True)


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html again from the run folder's files."""
    from sylva_ray.reports.pages.run import write_report
    from sylva_ray.storage.run_folder import load_run

    with _run_folder(run, "change") as (run_dir, _):
        load_run(run_dir)
        typer.echo(write_report(run_dir))


@app.command()
def track(run: RunFolder, overrides: Overrides = None) -> None:
    """Send to MLflow what it has missed of a run (tracking.uri=... names another server)."""
    from sylva_ray.observers.mlflow.tracker import send_run
    from sylva_ray.storage.run_folder import load_run

    with _run_folder(run, "change") as (run_dir, _):
        load_run(run_dir)
        problems = send_run(run_dir, load_run_config(run_dir, overrides or []))
    if problems:
        raise RunError("; ".join(problems))
    typer.echo(f"MLflow has all of {run}")


@app.command()
def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|FILE.json|EXPERIMENT[/SWEEP]...",
            help="run folders, folders of runs, summaries, MLflow experiments",
        ),
    ],
    out: Annotated[list[Path] | None, typer.Option(help="FILE.html, .csv or .md; may be given again")] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)")
    ] = None,
) -> None:
    """Runs beside each other: means and spread over seeds, what dominates what, what failed its checks."""
    from sylva_ray.observers.sources import load
    from sylva_ray.reports import compare as comparison
    from sylva_ray.reports.compare.files import check_targets, write

    check_targets(out or [])
    with ExitStack() as stack:
        here = [str(stack.enter_context(_run_folder(source, "read"))[0]) for source in sources]
        summaries, left_out = load(here, uri)
    rows = comparison.compare(summaries)
    console = _console()
    for table in comparison.terminal_tables(rows, console.width):
        console.print(table)
        console.print()
    for style, lines in comparison.remarks(rows, left_out):
        for line in lines:
            console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
    for path in out or []:
        write(rows, path, left_out)
        typer.echo(path)


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="where the adapters go: TO/client_000, ...")],
    client: Annotated[str, typer.Option(help="a client's number, or all")] = "all",
    merged: Annotated[bool, typer.Option("--merged", help="also the whole model with the adapter merged in")] = False,
) -> None:
    """Write clients as PEFT adapters (load them with PeftModel.from_pretrained on the timm model)."""
    from sylva_ray.models.export import export_clients
    from sylva_ray.storage.run_folder import load_run

    with _run_folder(run, "read") as (run_dir, _):
        config, states = load_run(run_dir)
    if client != "all" and not (client.isdigit() and int(client) < len(states)):
        raise UserError("--client", client, f"must be all or 0 to {len(states) - 1}")
    clients = range(len(states)) if client == "all" else [int(client)]
    for folder in export_clients(config, states, clients, to, merged):
        typer.echo(folder)


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder of checkpoints, log and result")] = Path("runs/pretrain"),
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
) -> None:
    """Train a backbone where none can be downloaded."""
    from sylva_ray.pretraining.trainer import load_pretrain_config
    from sylva_ray.pretraining.trainer import pretrain as train_backbone

    def show(event: dict[str, Any]) -> None:
        typer.echo(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in event.items()
            )
        )

    typer.echo(train_backbone(load_pretrain_config(config, overrides or []), out, resume, show))


@app.command(name="bytes")
def bytes_(
    backbone: Annotated[str, typer.Option(help="any timm model with a linear classifier")] = OFFLINE_BACKBONE,
    rank: Annotated[list[int] | None, typer.Option(help="LoRA rank; may be given again (default: 8)")] = None,
    target_module: Annotated[list[str] | None, typer.Option(help="adapted layers; may be given again")] = None,
    num_classes: Annotated[int, typer.Option(min=2)] = 10,
    method: Annotated[list[str] | None, typer.Option(help="may be given again (default: all)")] = None,
    num_clients: Annotated[int, typer.Option(min=1, help="whose factors FLoRA and FedEx-LoRA send down")] = 10,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="also write the table here")] = None,
) -> None:
    """Bytes per client and round of every method: by arithmetic, of the file that travels, against the full model."""
    from sylva_ray.config.schema import build
    from sylva_ray.reports.traffic import terminal_table, traffic_table, write_csv

    lora = LoraSection(**({"target_modules": tuple(target_module)} if target_module else {}))
    ranks = rank or [lora.rank]
    for value in ranks:
        build(LoraSection, {"rank": value}, "lora")
    if csv is not None and (csv.is_dir() or not csv.parent.is_dir()):
        raise UserError("--csv", str(csv), "is a folder" if csv.is_dir() else "its folder does not exist")
    rows = traffic_table(BackboneSection(name=backbone), lora, ranks, num_classes, method, num_clients)
    title = f"{backbone}, {num_classes} classes, {', '.join(lora.target_modules)}: bytes per client and round"
    console = _console()
    if not console.is_terminal:
        console.width = 112  # room for the methods' names
    console.print(terminal_table(rows, title))
    if csv is not None:
        write_csv(rows, csv)
        typer.echo(csv)


cluster_app = typer.Typer(help="Machines: see docs/clusters.md.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cluster_app, name="cluster")


@cluster_app.callback()
def cluster() -> None:
    """Machines: see docs/clusters.md."""


@cluster_app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a cluster.yaml for `ray up`")],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(metavar="CONFIG", help="also tell what one run of it asks for")] = None,
) -> None:
    """Validate a cluster.yaml offline, and tell what a run would ask of the cluster. Starts nothing."""
    from sylva_ray.provisioning.demand import demand_lines, demand_of, launcher_lines
    from sylva_ray.provisioning.launcher_file import load_launcher_file

    if overrides and config is None:
        raise UserError("override", overrides[0], "changes a run's config, and there is none: add --config CONFIG")
    launcher = load_launcher_file(file)
    lines = launcher_lines(launcher)
    if config is not None:
        lines += demand_lines(demand_of(load_config(config, overrides or []), launcher), launcher)
    for line in lines:
        typer.echo(line)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _console() -> Console:
    console = Console()
    console.width = max(console.width, MIN_WIDTH)
    return console


@contextmanager
def _run_folder(
    where: str, purpose: Literal["start", "resume", "read", "change"]
) -> Iterator[tuple[Path, RemoteFolder | None]]:
    """A run folder as a local path; where it is a URL, a copy of what is there, and sent back if it was to be changed."""
    from sylva_ray.storage.remote_copy import RemoteFolder, is_url

    if not is_url(where):
        yield Path(where), None
        return
    remote = RemoteFolder(where)
    with remote.held():
        if purpose == "start":
            remote.start()
        else:
            remote.pull()
        try:
            yield remote.local, remote
        except (KeyboardInterrupt, SystemExit, RunError):
            if purpose == "change":  # what was measured until now
                with suppress(RunError):
                    remote.push()
            raise
        if purpose == "change":
            remote.push()


class _resumable:
    """Turns a failure of what has begun (``sign``, a file or folder, is there) into one line that says ``how`` to go on.
    SIGTERM is one, too."""

    def __init__(self, sign: Path, how: str) -> None:
        self.sign, self.how = sign, how
        self._stopped = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._stop)  # Ray's own is put aside by `ray_session`

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        failure, what = RunError, str(error)
        if isinstance(error, KeyboardInterrupt):
            failure, what = Interrupted, "interrupted"
        elif isinstance(error, SystemExit) and self._stopped:
            failure, what = Stopped, "stopped"
        elif not isinstance(error, RunError | OSError):
            return
        if self.sign.exists():
            raise failure(f"{what}. {self.how}") from error

    def _stop(self, signum: int, frame: object) -> None:
        """As an exception, so that whatever is open is closed. Ray makes a SystemExit of its own of it, with another code."""
        del frame
        self._stopped = True
        sys.exit(128 + signum)


def main() -> None:
    """Entry point: maps errors to one line on stderr and an exit code."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except (UserError, RunError) as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}", 1)
    except Exception as error:  # typer's usage errors, which carry their own exit code
        if hasattr(error, "format_message"):
            _fail(error.format_message(), 2)
        raise


def _fail(message: str, code: int) -> None:
    print(f"sylva-ray: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

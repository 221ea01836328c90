"""The command ``sylva-ray run``."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from sylva_ray.cli.arguments import AllowChanged, Imports, Log, Overrides, Quiet, Verbose, complete_experiments, show_of


def run(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file or the name of a recipe; with --resume, a run folder or its URL.",
            autocompletion=complete_experiments,
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Run folder or URL, e.g. s3://bucket/run (default: runs/NAME-TIME)."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run from its newest checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print settings, bytes, memory and time; start and write nothing.")
    ] = False,
    allow_changed: AllowChanged = False,
    imports: Imports = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_format: Log = None,
) -> None:
    """Run an experiment: training, evaluation and report."""
    from sylva_ray import api
    from sylva_ray.core.errors import UserError

    imports, show = imports or [], show_of(quiet, verbose)
    if dry_run:
        if resume or out is not None or allow_changed:
            given = [("--resume", resume or None), ("--out", out), ("--allow-changed", allow_changed or None)]
            option, value = next((name, value) for name, value in given if value is not None)
            fix = "a dry run starts and writes nothing: leave out --resume, --out and --allow-changed"
            raise UserError(option, value, fix)
        if quiet or verbose or log_format is not None:
            fix = "prints nothing but its result: leave out --quiet, --verbose and --log-format"
            raise UserError("--dry-run", config, fix)
        columns = shutil.get_terminal_size((80, 24)).columns
        typer.echo("\n".join(api.dry_run(config, overrides or [], columns=columns, imports=imports)))
        return
    if allow_changed and not resume:
        raise UserError("--allow-changed", config, "has no effect on a new run: use it with --resume")
    api.check_source(config, resume, out)
    if not resume:
        api.run(config, overrides or [], out=out, imports=imports, show=show, log_format=log_format)
        return
    api.resume(
        config if out is None else out,
        overrides or [],
        config=None if out is None else config,
        allow_changed=allow_changed,
        imports=imports,
        show=show,
        log_format=log_format,
    )

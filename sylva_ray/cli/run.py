"""The command ``sylva-ray run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sylva_ray.cli.arguments import AllowChanged, Imports, Log, Overrides, Quiet, Verbose, show_of


def run(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="A YAML file or the name of a recipe; with --resume, a run folder or its URL."
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
    is_run = api.is_run_folder(config)
    if dry_run:
        if resume or out is not None or allow_changed:
            fix = "starts and writes nothing: leave out --resume, --out and --allow-changed"
            raise UserError("--dry-run", config, fix)
        if quiet or verbose or log_format is not None:
            fix = "prints nothing but its result: leave out --quiet, --verbose and --log-format"
            raise UserError("--dry-run", config, fix)
        typer.echo("\n".join(api.dry_run(config, overrides or [], imports=imports)))
        return
    if allow_changed and not resume:
        raise UserError("--allow-changed", config, "has no effect on a new run: use it with --resume")
    _check_source(config, is_run, resume, out)
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


def _check_source(config: str, is_folder: bool, resume: bool, out: str | None) -> None:
    """Check that CONFIG, --resume and --out say where a run is, or what a new one is made from.

    Raises:
        UserError: they do not.
    """
    from sylva_ray.config.recipes import recipes
    from sylva_ray.config.stored import RUN_CONFIG
    from sylva_ray.core.errors import UserError

    if resume and out is None and not is_folder:
        if not Path(config).exists() and config not in recipes():
            raise UserError("RUN", config, "no such run folder")
        raise UserError("--resume", config, "needs --out FOLDER (or the run folder instead of CONFIG)")
    if resume:
        return
    if "://" in config:
        raise UserError("CONFIG", config, "is a URL; use --resume to continue the run there, or give a YAML file")
    if is_folder and not (Path(config) / RUN_CONFIG).is_file():
        raise UserError("CONFIG", config, f"is a folder without {RUN_CONFIG}: neither a run nor a configuration")
    if is_folder and out is None:
        fix = "is a folder; use --resume to continue the run in it, or --out for a new run with its config"
        raise UserError("CONFIG", config, fix)

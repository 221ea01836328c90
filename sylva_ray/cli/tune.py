"""The command ``sylva-ray tune``."""

from __future__ import annotations

from typing import Annotated

import typer

from sylva_ray.cli.arguments import AllowChanged, Imports, Log, Quiet, Verbose, complete_spaces, show_of


def tune(
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE",
            help="A YAML file or the name of a recipe; with --resume, the folder of a sweep.",
            autocompletion=complete_spaces,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings of the space (search.num_points=30) or of the experiment of all trials (training.rounds=5).",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Sweep folder (default: runs/NAME-TIME).")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a sweep: run the trials that have not finished.")
    ] = False,
    allow_changed: AllowChanged = False,
    imports: Imports = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_format: Log = None,
) -> None:
    """Run a sweep of experiments on Ray Tune.

    SPACE names the settings that change and their values; `sylva-ray init DIR --recipe grid` copies an example.
    """
    from sylva_ray import api
    from sylva_ray.core.errors import RunError

    sweep = api.sweep(
        space,
        overrides or [],
        out=out,
        resume=resume,
        allow_changed=allow_changed,
        imports=imports or [],
        show=show_of(quiet, verbose),
        log_format=log_format,
    )
    if sweep.failed:
        raise RunError(sweep.failure_text)

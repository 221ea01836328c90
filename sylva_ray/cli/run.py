"""``sylva-ray run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sylva_ray.cli.arguments import Overrides, Quiet


def run(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="a YAML file, or a run folder (or URL) with --resume")
    ],
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option(help="run folder, or a URL such as s3://... (default: runs/NAME-TIME)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    quiet: Quiet = False,
) -> None:
    """Run one experiment: both phases, evaluation, report."""
    from sylva_ray import api
    from sylva_ray.core.errors import UserError

    show: Literal["progress", "result"] = "result" if quiet else "progress"
    is_run = "://" in config or Path(config).is_dir()
    if not resume:
        if is_run and out is None:
            raise UserError(
                "CONFIG", config, "is a run folder; add --resume to continue it, or --out for a new run of it"
            )
        api.run(config, overrides or [], out=out, show=show)
    elif is_run:
        api.resume(out or config, overrides or [], config=config if out else None, show=show)
    elif out is not None:
        api.resume(out, overrides or [], config=config, show=show)
    else:
        raise UserError("--resume", config, "needs --out DIR (or the run folder in place of CONFIG)")

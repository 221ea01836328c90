"""``sylva-ray pretrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sylva_ray.cli.arguments import Overrides


def pretrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder of checkpoints, log and result")] = Path("runs/pretrain"),
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
) -> None:
    """Train a backbone where none can be downloaded."""
    from sylva_ray import api

    typer.echo(api.pretrain(config, overrides or [], out=out, resume=resume))

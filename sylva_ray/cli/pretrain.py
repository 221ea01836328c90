"""The command ``sylva-ray pretrain``."""

from __future__ import annotations

from typing import Annotated

import typer

from sylva_ray.cli.arguments import AllowChanged, Overrides


def pretrain(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file or the name of a recipe, e.g. pretrain_tiny_imagenet.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Folder for checkpoints, log and result.")
    ] = "runs/pretrain",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")] = False,
    allow_changed: AllowChanged = False,
) -> None:
    """Pretrain a backbone on labelled images."""
    from sylva_ray import api

    typer.echo(api.pretrain(config, overrides or [], out=out, resume=resume, allow_changed=allow_changed))

"""The command ``sylva-ray pretrain``."""

from __future__ import annotations

from typing import Annotated

import typer

from sylva_ray.cli.arguments import AllowChanged, Log, complete_pretrainings, show_of


def pretrain(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file or the name of a recipe, e.g. pretrain_tiny_imagenet.",
            autocompletion=complete_pretrainings,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the file, e.g. training.epochs=5."),
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Folder for checkpoints, log and result.")
    ] = "runs/pretrain",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")] = False,
    allow_changed: AllowChanged = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path of the backbone.")] = False,
    log_format: Log = None,
) -> None:
    """Pretrain a backbone on labelled images. Every epoch is a line, and is kept."""
    from sylva_ray import api

    api.pretrain(
        config,
        overrides or [],
        out=out,
        resume=resume,
        allow_changed=allow_changed,
        show=show_of(quiet, verbose=False),
        log_format=log_format,
    )

"""The command ``sylva-ray export``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from sylva_ray.cli.arguments import AllowChanged, Log, RunFolder, show_of


def export(
    run: RunFolder,
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Output folder; clients are in FOLDER/client_000, ...")],
    client: Annotated[str, typer.Option(metavar="NUMBER", help="Number of a client, from 0, or all.")] = "all",
    merged: Annotated[bool, typer.Option("--merged", help="Also write the whole model with merged adapter.")] = False,
    form: Annotated[
        Literal["peft", "onnx"],
        typer.Option("--format", help="onnx: also the whole model for ONNX Runtime, which takes pixels in [0, 1]."),
    ] = "peft",
    allow_changed: AllowChanged = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the clients' folders only.")] = False,
    log_format: Log = None,
) -> None:
    """Export the clients of a run as PEFT adapters (whole models, where the method trains these).

    FOLDER/load.py loads them with timm and PEFT alone. Every client has a model card, README.md.
    """
    from sylva_ray import api
    from sylva_ray.core.errors import UserError, asked_as

    if client != "all" and not (client.isascii() and client.isdigit() and len(client) < 10):
        raise UserError("--client", client, "must be all or the number of a client, from 0")
    clients = None if client == "all" else [int(client)]
    with asked_as("--client", "clients"):
        api.export(
            run,
            to,
            clients,
            merged=merged,
            onnx=form == "onnx",
            allow_changed=allow_changed,
            show=show_of(quiet, verbose=False),
            log_format=log_format,
        )

"""``sylva-ray export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sylva_ray.cli.arguments import RunFolder


def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="where the adapters go: TO/client_000, ...")],
    client: Annotated[str, typer.Option(help="a client's number, or all")] = "all",
    merged: Annotated[bool, typer.Option("--merged", help="also the whole model with the adapter merged in")] = False,
) -> None:
    """Write clients as PEFT adapters (load them with PeftModel.from_pretrained on the timm model)."""
    from sylva_ray import api
    from sylva_ray.core.errors import UserError

    if client != "all" and not client.isdigit():
        raise UserError("--client", client, "must be all or a client's number, counted from 0")
    for folder in api.export(run, to, None if client == "all" else [int(client)], merged=merged):
        typer.echo(folder)

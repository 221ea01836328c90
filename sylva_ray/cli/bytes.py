"""The command ``sylva-ray bytes``."""

from __future__ import annotations

from typing import Annotated

import typer

from sylva_ray.cli.arguments import Imports


def traffic(
    backbone: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A timm model with a linear classifier (default: the one in this package)."),
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option(metavar="RANK", help="LoRA rank (default: 8). Can be given several times.")
    ] = None,
    target_module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE", help="Layers with adapters (default: those of lora.target_modules). Can be repeated."
        ),
    ] = None,
    num_classes: Annotated[int, typer.Option(metavar="N", min=2, help="Classes of the data set.")] = 10,
    method: Annotated[
        list[str] | None, typer.Option(metavar="METHOD", help="A method (default: all). Can be given several times.")
    ] = None,
    num_clients: Annotated[
        int, typer.Option(metavar="N", min=1, help="Clients, for methods whose download grows with them.")
    ] = 10,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="Also write the table to this CSV file.")] = None,
    imports: Imports = None,
) -> None:
    """Print the traffic of every method.

    The table has the bytes per client and round, by arithmetic and of the serialised update, and the ratio to the full
    model.
    """
    from sylva_ray import api

    api.traffic(
        backbone,
        ranks=rank or [],
        target_modules=target_module or [],
        num_classes=num_classes,
        methods=method or [],
        num_clients=num_clients,
        csv=csv,
        imports=imports or [],
    )

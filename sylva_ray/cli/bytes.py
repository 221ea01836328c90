"""``sylva-ray bytes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def traffic(
    backbone: Annotated[
        str | None, typer.Option(help="any timm model with a linear classifier (default: the one that ships)")
    ] = None,
    rank: Annotated[list[int] | None, typer.Option(help="LoRA rank; may be given again (default: 8)")] = None,
    target_module: Annotated[list[str] | None, typer.Option(help="adapted layers; may be given again")] = None,
    num_classes: Annotated[int, typer.Option(min=2)] = 10,
    method: Annotated[list[str] | None, typer.Option(help="may be given again (default: all)")] = None,
    num_clients: Annotated[int, typer.Option(min=1, help="whose factors FLoRA and FedEx-LoRA send down")] = 10,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="also write the table here")] = None,
) -> None:
    """Bytes per client and round of every method: by arithmetic, of the file that travels, against the full model."""
    from sylva_ray import api

    api.traffic(
        backbone,
        ranks=rank or [],
        target_modules=target_module or [],
        num_classes=num_classes,
        methods=method or [],
        num_clients=num_clients,
        csv=csv,
    )

"""The command ``sylva-ray repair``."""

from __future__ import annotations

import typer

from sylva_ray.cli.arguments import RunFolder


def repair(run: RunFolder) -> None:
    """Restore config.yaml and other files of a run from its newest checkpoint."""
    from sylva_ray import api

    for line in api.repair(run) or ["nothing to repair"]:
        typer.echo(line)

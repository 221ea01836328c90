"""The command ``sylva-ray report``."""

from __future__ import annotations

import typer

from sylva_ray.cli.arguments import RunFolder


def report(run: RunFolder) -> None:
    """Write the report.html of a run again."""
    from sylva_ray import api

    typer.echo(api.report(run))

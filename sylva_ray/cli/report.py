"""The command ``sylva-ray report``."""

from __future__ import annotations

import typer

from sylva_ray.cli.arguments import RunFolder


def report(run: RunFolder) -> None:
    """Write the report.html of a run again."""
    from sylva_ray import api

    written = api.report(run)  # of a run at a URL: the local copy of what stands there now
    typer.echo(f"{run.rstrip('/')}/{written.name}" if "://" in run else written)

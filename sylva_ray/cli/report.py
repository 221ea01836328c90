"""``sylva-ray report``."""

from __future__ import annotations

import typer

from sylva_ray.cli.arguments import RunFolder


def report(run: RunFolder) -> None:
    """Write report.html again from the run folder's files."""
    from sylva_ray import api

    typer.echo(api.report(run))

"""``sylva-ray track``."""

from __future__ import annotations

import typer

from sylva_ray.cli.arguments import Overrides, RunFolder


def track(run: RunFolder, overrides: Overrides = None) -> None:
    """Send to MLflow what it has missed of a run (tracking.uri=... names another server)."""
    from sylva_ray import api

    api.track(run, overrides or [])
    typer.echo(f"MLflow has all of {run}")

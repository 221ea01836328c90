"""The command ``sylva-ray track``."""

from __future__ import annotations

import typer

from sylva_ray.cli.arguments import Overrides, RunFolder


def track(run: RunFolder, overrides: Overrides = None) -> None:
    """Send a run to MLflow again.

    Only what the server does not have yet is sent. Use tracking.uri=... for another server.
    """
    from sylva_ray import api

    api.track(run, overrides or [])
    typer.echo(f"MLflow has received all of {run}")

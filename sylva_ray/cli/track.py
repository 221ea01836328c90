"""The command ``sylva-ray track``."""

from __future__ import annotations

from typing import Annotated

import typer

from sylva_ray.cli.arguments import RunFolder


def track(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of tracking only, e.g. tracking.uri=http://HOST:5000."),
    ] = None,
) -> None:
    """Send a run to MLflow again.

    Only what the server does not have yet is sent.
    """
    from sylva_ray import api

    api.track(run, overrides or [])
    typer.echo(f"MLflow has received all of {run}")

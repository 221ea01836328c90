"""The command ``sylva-ray version``."""

from __future__ import annotations

import typer

from sylva_ray import __version__


def version() -> None:
    """Print the version."""
    typer.echo(__version__)

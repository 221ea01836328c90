"""``sylva-ray compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|FILE.json|EXPERIMENT[/SWEEP]...",
            help="run folders, folders of runs, summaries, MLflow experiments",
        ),
    ],
    out: Annotated[list[Path] | None, typer.Option(help="FILE.html, .csv or .md; may be given again")] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)")
    ] = None,
) -> None:
    """Runs beside each other: means and spread over seeds, what dominates what, what failed its checks."""
    from sylva_ray import api

    api.compare(sources, out=out or [], uri=uri)

"""The command ``sylva-ray compare``."""

from __future__ import annotations

from typing import Annotated

import typer


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Run folders, folders of runs, summary files (.json), or MLflow experiments (NAME or NAME/SWEEP).",
        ),
    ],
    out: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Also write a .html, .csv or .md file. Can be given several times."),
    ] = None,
    uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."),
    ] = None,
) -> None:
    """Compare runs.

    The table has means and standard deviations over seeds, which methods dominate others, and which runs failed checks.
    """
    from sylva_ray import api

    api.compare(sources, out=out or [], uri=uri)

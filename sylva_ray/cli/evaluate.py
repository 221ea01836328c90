"""``sylva-ray evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sylva_ray.cli.arguments import RunFolder


def evaluate(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="cluster.*, training.device, evaluation.precision only"),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME:key=value,...; may be given again, e.g. pgd:steps=100,restarts=5"),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="quick, standard (AutoAttack) or full")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="test images per client (default: the run's own)")] = None,
    epsilon: Annotated[
        str | None, typer.Option(help="of suites, curves and checks (default: the run's first attack's)")
    ] = None,
    checks: Annotated[bool, typer.Option("--checks", help="S1 to S14 (docs/checks.md)")] = False,
    curves: Annotated[bool, typer.Option("--curves", help="accuracy against epsilon and against steps")] = False,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="every client's model attacked through the others")
    ] = False,
    surrogate: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="attack through this run's models as well")
    ] = None,
    certify: Annotated[
        list[float] | None, typer.Option(metavar="SIGMA", help="randomised smoothing with this noise")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON (default: RUN/evaluation.json)")] = None,
) -> None:
    """Attack the trained, personal models of a run; what was measured before is not measured again."""
    from sylva_ray import api

    api.evaluate(
        run,
        attack or [],
        suite=suite,
        images=images,
        epsilon=epsilon,
        checks=checks,
        curves=curves,
        transfer=transfer,
        surrogates=surrogate or [],
        certify=certify or [],
        overrides=overrides or [],
        out=out,
    )

"""The command ``sylva-ray evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from sylva_ray.cli.arguments import AllowChanged, Imports, Log, Quiet, RunFolder, Verbose, show_of


def evaluate(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings: cluster.*, training.device, .attention, .windows and evaluation.precision only.",
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ATTACK", help="NAME or NAME:key=value,..., e.g. pgd:steps=100,restarts=5. Can be repeated."
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="SUITE", help="Attacks: quick, standard (AutoAttack) or full.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Test images per client (default: all of the run).")
    ] = None,
    epsilon: Annotated[
        str | None,
        typer.Option(
            metavar="EPSILON",
            help="Epsilon of suites, curves, checks, and attacks that name none (default: that of the first L-infinity "
            "attack whose epsilon --attack names, or else of the run).",
        ),
    ] = None,
    checks: Annotated[
        bool, typer.Option("--checks", help="Run the checks S1 to S14 (see `sylva-ray list checks`).")
    ] = False,
    curves: Annotated[
        bool, typer.Option("--curves", help="Measure accuracy as a function of epsilon and of steps.")
    ] = False,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Attack every client's model with images made for other clients.")
    ] = False,
    surrogate: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="Also attack with images made for the models of this run.")
    ] = None,
    certify: Annotated[
        list[float] | None,
        typer.Option(metavar="SIGMA", help="Certify by randomised smoothing with this standard deviation."),
    ] = None,
    allow_changed: AllowChanged = False,
    imports: Imports = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="File of results (default: RUN/evaluation.json).")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log_format: Log = None,
) -> None:
    """Attack the models of a finished run.

    Measurements are kept in the run folder; those that exist are not repeated.
    """
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
        allow_changed=allow_changed,
        imports=imports or [],
        out=out,
        show=show_of(quiet, verbose),
        log_format=log_format,
    )

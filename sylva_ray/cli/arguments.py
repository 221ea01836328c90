"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from sylva_ray.core.errors import UserError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the file, e.g. training.rounds=5."),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run folder or its URL.")]
AllowChanged = Annotated[
    bool,
    typer.Option(
        "--allow-changed", help="Go on although data or weights are not those of the run; results then say so."
    ),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="DIR",
        help="Import your own methods (package.module:Class) from this directory, too. Can be given several times.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the table of results at the end.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print every finished task, too (of a sweep: every step).")
]
Log = Annotated[
    Literal["plain", "json"] | None,
    typer.Option("--log-format", help="Lines with time stamps: plain sentences, or one JSON object per event."),
]


def complete_kinds(incomplete: str) -> list[str]:
    """Return the kinds of `sylva-ray list` that begin with a text, for the completion of shells."""
    from sylva_ray import api

    return [kind for kind in api.KINDS if kind.startswith(incomplete)]


def complete_recipes(incomplete: str) -> list[str]:
    """Return the names of recipes that begin with a text, for the completion of shells."""
    return _recipes("", incomplete)


def complete_experiments(incomplete: str) -> list[str]:
    """Return likewise the recipes of experiments."""
    return _recipes("experiment", incomplete)


def complete_spaces(incomplete: str) -> list[str]:
    """Return likewise the recipes of spaces."""
    return _recipes("space", incomplete)


def complete_pretrainings(incomplete: str) -> list[str]:
    """Return likewise the recipes of pre-trainings."""
    return _recipes("pretraining", incomplete)


def _recipes(kind: str, beginning: str) -> list[str]:
    from sylva_ray import api

    entries = api.catalogue("recipes")
    return [entry.name for entry in entries if entry.summary.startswith(kind) and entry.name.startswith(beginning)]


def show_of(quiet: bool, verbose: bool) -> Literal["tasks", "progress", "result"]:
    """Return what is printed with these options.

    Raises:
        UserError: they contradict each other.
    """
    if quiet and verbose:
        raise UserError("--quiet", True, "contradicts --verbose: use one of the two")
    return "result" if quiet else "tasks" if verbose else "progress"

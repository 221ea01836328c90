"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

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
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the table of results at the end.")]

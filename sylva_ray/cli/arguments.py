"""Arguments that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted keys, e.g. training.rounds=5")
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or its URL")]
Quiet = Annotated[bool, typer.Option("--quiet", help="only the closing table")]

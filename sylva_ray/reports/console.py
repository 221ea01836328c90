"""The console that commands print on. Importing it is quick, so that something is on the screen at once."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from textwrap import TextWrapper

from rich.console import Console
from rich.text import Text

from sylva_ray.core.text import Show

FILE_WIDTH = 100
"""Width of tables in characters where the output is no terminal: a file, a pipe, a notebook."""


def create_console(show: Show = "progress") -> Console:
    """Return a console on standard output, or in a notebook's cell.

    Args:
        show: with ``nothing``, the console prints nothing.
    """
    console = Console(quiet=show == "nothing")
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    return console


def print_lines(console: Console, lines: Iterable[object], style: str = "") -> None:
    """Print each line unchanged, without markup, highlighting or wrapping."""
    for line in lines:
        console.print(str(line), style=style, highlight=False, markup=False, soft_wrap=True)


def wrapped(console: Console, lines: Iterable[str], indent: int) -> list[str]:
    """Break lines between words so that a terminal need not break them within words; paths stay in one piece.

    Args:
        console: where they will be printed; for a file they are returned as they are.
        lines: to break.
        indent: spaces before all but the first line of each.
    """
    if not console.is_terminal:
        return list(lines)
    wrapper = TextWrapper(console.width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return [part for line in lines for part in wrapper.wrap(line) or [""]]


def working_on(console: Console, what: str, quiet: bool) -> AbstractContextManager[object]:
    """Say what is being done for as long as a block lasts: beside a spinner on a terminal, else as a line.

    Args:
        console: where to print.
        what: is done, without a full stop.
        quiet: whether to say nothing.
    """
    if quiet:
        return nullcontext()
    if console.is_terminal:
        return console.status(Text(what, no_wrap=True, overflow="ellipsis"))
    print_lines(console, [what])
    return nullcontext()

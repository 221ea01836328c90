"""Names of quantities and formats of numbers in pages and figures."""

from __future__ import annotations

SECONDS = {
    "setup": "set-up",
    "train": "training weights",
    "attack": "crafting attacks",
    "game": "layer game",
    "evaluate": "evaluation",
    "aggregate": "aggregation",
    "idle": "workers waiting",
}
"""Titles of the keys of ``summary.seconds``, without the total."""


def bytes_text(value: float) -> str:
    """Format a size in decimal units, with three significant digits.

    >>> bytes_text(999), bytes_text(41_234), bytes_text(2.5e9)
    ('999 B', '41.2 kB', '2.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def percent(value: float | None) -> str:
    r"""Format a fraction in per cent, with a no-break space; None is shown as a dash.

    >>> percent(0.61345), percent(None)
    ('61.3\xa0%', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"

"""Names of quantities and formats of numbers in pages and figures."""

from __future__ import annotations

SECONDS = {
    "setup": "set-up",
    "train": "training weights",
    "attack": "crafting attacks",
    "mixture": "trying mixtures",
    "game": "layer game",
    "evaluate": "evaluation",
    "aggregate": "aggregation",
    "other": "other work",
    "idle": "workers waiting",
}
"""Titles of the keys of ``summary.seconds``, without the total."""


def significant(value: float, digits: int) -> str:
    """Format a number with as many significant digits, never with an exponent.

    >>> significant(100.2, 2), significant(5.432, 2), significant(0.01234, 2)
    ('100', '5.4', '0.012')
    """
    return f"{float(f'{value:.{digits}g}'):.12g}" if abs(value) >= 1e-4 else f"{value:.6f}".rstrip("0").rstrip(".")


def bytes_text(value: float) -> str:
    """Format a size in decimal units, with three significant digits.

    >>> bytes_text(999), bytes_text(999_999), bytes_text(41_234), bytes_text(2.5e9)
    ('999 B', '1 MB', '41.2 kB', '2.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if float(significant(value, 3)) < 1000:
            return f"{significant(value, 3)} {unit}"
        value /= 1000
    return f"{significant(value, 3)} TB"


def percent(value: float | None) -> str:
    r"""Format a fraction in per cent, with a no-break space; None is shown as a dash.

    >>> percent(0.61345), percent(None)
    ('61.3\xa0%', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"

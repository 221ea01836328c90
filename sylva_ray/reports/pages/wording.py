"""Names and numbers as a newcomer reads them."""

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
"""Keys of ``summary.seconds`` but the total."""


def bytes_text(value: float) -> str:
    """A size in decimal units.

    >>> bytes_text(999), bytes_text(41_234), bytes_text(2.5e9)
    ('999 B', '41.2 kB', '2.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def percent(value: float | None) -> str:
    r"""A fraction in per cent; the space does not break.

    >>> percent(0.61345), percent(None)
    ('61.3\xa0%', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"

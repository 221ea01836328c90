"""Names and numbers as a newcomer reads them."""

from __future__ import annotations

import re

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


LABEL = re.compile(r"([a-z]+)(\d*)(?:x(\d+))?(?:-([a-z]+))?-eps([\d.e+-]+)")
"""An attack's label: name, steps, restarts, loss, epsilon in 1/255."""


def attack_title(label: str) -> str:
    """An attack's label in words.

    >>> attack_title("pgd20-eps8")
    'PGD-20 at epsilon 8/255'
    >>> attack_title("pgd50x5-margin-eps4")
    'PGD-50 (margin loss, 5 restarts) at epsilon 4/255'
    """
    match = LABEL.fullmatch(label)
    if match is None:
        return label
    name, steps, restarts, loss, epsilon = match.groups()
    details = [f"{loss} loss"] * bool(loss) + [f"{restarts} restarts"] * bool(restarts)
    name = f"{name.upper()}-{steps}" if steps else name.upper()
    name = f"{name} ({', '.join(details)})" if details else name
    return f"{name} at epsilon {epsilon}/255"


def attack_strength(label: str) -> tuple[float, int]:
    """Epsilon (in 1/255), then gradient steps: the order in which attacks get stronger. A label that is none comes first.

    >>> attack_strength("pgd20-eps4") < attack_strength("pgd50x5-margin-eps4") < attack_strength("fgsm-eps8")
    True
    """
    match = LABEL.fullmatch(label)
    if match is None:
        return -1.0, 0
    _, steps, restarts, _, epsilon = match.groups()
    return float(epsilon), int(steps or 1) * int(restarts or 1)


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

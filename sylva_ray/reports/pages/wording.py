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


LABEL = re.compile(r"([a-z]+)(\d*)(?:x(\d+))?((?:-[a-z_]+[\d.]*)*?)(?:-eps([\d.e+-]+))?")
"""An attack's label: name, steps, restarts, its loss, norm and options, epsilon (of 255 for L-infinity)."""

NAMES = {
    "noise": "random noise",
    "autoattack": "AutoAttack",
    "deepfool": "DeepFool",
    "sparsefool": "SparseFool",
    "square": "Square",
}


def attack_title(label: str) -> str:
    """An attack's label in words.

    >>> attack_title("pgd20-eps8")
    'PGD-20 at epsilon 8/255'
    >>> attack_title("pgd50x5-margin-eps4")
    'PGD-50 (margin loss, 5 restarts) at epsilon 4/255'
    >>> attack_title("apgd100-targeted-l2-targets9-eps0.5")
    'APGD-100 (targeted loss, targets 9) at L2 epsilon 0.5'
    >>> attack_title("deepfool50-l2")
    'DeepFool-50 (nearest in L2)'
    """
    match = LABEL.fullmatch(label)
    if match is None:
        return label
    name, steps, restarts, rest, epsilon = match.groups()
    parts = [part for part in rest.split("-") if part]
    norm = next((part.upper() for part in parts if part in ("l2", "l0")), "")
    details = [f"{part} loss" for part in parts if part in ("margin", "dlr", "targeted", "kl") and name != "cw"]
    details += [f"{restarts} restarts"] * bool(restarts)
    details += [" ".join(re.split(r"(?=\d)", part, maxsplit=1)) for part in parts if re.search(r"[a-z_]{3,}\d", part)]
    if epsilon is None:
        details.append(f"nearest in {norm}")
    shown = NAMES.get(name, name.upper())
    shown = f"{shown}-{steps}" if steps else shown
    shown = f"{shown} ({', '.join(details)})" if details else shown
    if epsilon is None:
        return shown
    return f"{shown} at {norm} epsilon {epsilon}" if norm else f"{shown} at epsilon {epsilon}/255"


def attack_strength(label: str) -> tuple[float, int]:
    """Epsilon (in 1/255), then gradient steps: the order in which attacks get stronger. A label that is none comes first.

    >>> attack_strength("pgd20-eps4") < attack_strength("pgd50x5-margin-eps4") < attack_strength("fgsm-eps8")
    True
    """
    match = LABEL.fullmatch(label)
    if match is None or match[5] is None:
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

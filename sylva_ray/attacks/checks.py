"""Checks that say whether a robustness number can be believed. Each result carries what it means, beside the number.

The numbering follows Carlini et al. 2019 ("On Evaluating Adversarial Robustness") as adapted in docs/checks.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sylva_ray.attack_settings import default_step_size
from sylva_ray.types import AttackSpec

UNBOUNDED = AttackSpec("pgd", epsilon=1.0, steps=20, step_size=default_step_size(1.0, 20))
"""The attack of S4: within epsilon 1 every image is reachable."""

S4_IMAGES = 32
"""Images per client for S4."""


@dataclass(frozen=True)
class CheckResult:
    """``value`` is the number that was tested; ``meaning`` is one sentence for the report."""

    name: str
    passed: bool
    value: float
    meaning: str


def unbounded_attack(robust_accuracy: float, num_classes: int) -> CheckResult:
    """S4: at epsilon 1 nothing is left to defend; what survives is hidden from the attack, not robust."""
    chance = 1 / num_classes
    passed = robust_accuracy <= chance
    meaning = (
        f"an attack without bound leaves {robust_accuracy:.1%} standing, at most chance ({chance:.1%})"
        if passed
        else f"an attack without bound still leaves {robust_accuracy:.1%} standing, above chance ({chance:.1%}): "
        "gradients are masked or the prediction is constant, so the robust accuracies below are too high"
    )
    return CheckResult("S4", passed, robust_accuracy, meaning)


def collapse(collapsed: list[bool]) -> CheckResult:
    """S14: a constant answer earns the majority share as benign *and* as robust accuracy."""
    count = sum(collapsed)
    if count == 0:
        meaning = "every client's robust accuracy exceeds what always answering its majority class would earn"
    else:
        which = ", ".join(str(client) for client, bad in enumerate(collapsed) if bad)
        meaning = (
            f"{count} of {len(collapsed)} clients do no better under attack than always answering their majority class, "
            f"or predict one class only (clients {which}): their robust accuracy shows no defence"
        )
    return CheckResult("S14", count == 0, count / len(collapsed), meaning)


def predicts_one_class(predictions: np.ndarray, labels: np.ndarray) -> bool:
    """Whether a client answers one class only although its test images show more."""
    return len(np.unique(predictions)) == 1 and len(np.unique(labels)) > 1


def is_collapsed(robust_accuracy: float, majority_share: float, one_class: bool) -> bool:
    """The mark behind S14, for one client."""
    return one_class or robust_accuracy <= majority_share

"""Checks that say whether a robustness number can be believed. Each result carries what it means, beside the number.

The numbering is that of docs/checks.md: what Carlini et al. 2019 ("On Evaluating Adversarial Robustness") and AutoAttack's
own checks ask for, the planted points of Zimmermann et al. 2022, and collapse under label skew. A check is a function of
measured accuracies; who measures them is `sylva_ray.evaluation.assessment`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from sylva_ray.attacks.pgd import default_step_size
from sylva_ray.core.summary import CheckResult
from sylva_ray.core.types import AttackSpec

UNBOUNDED = AttackSpec("pgd", epsilon=1.0, steps=20, step_size=default_step_size(1.0, 20))
"""The attack of S4: within epsilon 1 every image is reachable."""

S4_IMAGES = 32
"""Images per client for S4."""

TOLERANCE = 0.01
"""Accuracy by which a curve may rise against its direction."""

BLACK_BOX_MARGIN = 0.002
"""By how much a black-box attack may beat the white-box one: AutoAttack's own threshold."""

SAME_LOGITS = 1e-4
"""Largest difference between two forwards of the same image: AutoAttack's own threshold."""


def threat_model_stated(threat_model: Mapping[str, str]) -> CheckResult:
    """S1: norm, epsilon, pixel space and what the attacker knows are part of the number."""
    wanted = ("norm", "evaluation", "knowledge", "precision")
    missing = [key for key in wanted if not threat_model.get(key)]
    said = f"norm {threat_model.get('norm')}; {threat_model.get('knowledge')}"
    return _result("S1", not missing, len(missing), said, f"the threat model does not say {', '.join(missing)}")


def epsilon_zero(clean: float, at_zero: float) -> CheckResult:
    """S2: an attack that may change nothing must change nothing."""
    gap = abs(clean - at_zero)
    return _result(
        "S2",
        gap == 0,
        gap,
        "an attack with epsilon 0 leaves the benign accuracy as it is",
        f"an attack with epsilon 0 moves the accuracy from {clean:.1%} to {at_zero:.1%}: the model's answers are random",
    )


def falls_with_epsilon(curve: Mapping[float, float]) -> CheckResult:
    """S3: more room never helps the defender. ``curve`` is ``{epsilon: accuracy}``."""
    rise = _largest_rise(curve)
    return _result(
        "S3",
        rise <= TOLERANCE,
        rise,
        "accuracy does not rise as epsilon grows",
        f"accuracy rises by {rise:.1%} as epsilon grows: the attack fails where it has more room, so gradients mislead it",
    )


def unbounded_attack(robust_accuracy: float, num_classes: int) -> CheckResult:
    """S4: at epsilon 1 nothing is left to defend; what survives is hidden from the attack, not robust."""
    chance = 1 / num_classes
    return _result(
        "S4",
        robust_accuracy <= chance,
        robust_accuracy,
        f"an attack without bound leaves {robust_accuracy:.1%} standing, at most chance ({chance:.1%})",
        f"an attack without bound still leaves {robust_accuracy:.1%} standing, above chance ({chance:.1%}): "
        "gradients are masked or the prediction is constant, so the robust accuracies below are too high",
    )


def falls_with_steps(curve: Mapping[float, float]) -> CheckResult:
    """S5: more steps never help the defender, and four times as many hardly help the attacker. ``{steps: accuracy}``."""
    rise = _largest_rise(curve)
    most = max(curve)
    before = curve[max((k for k in curve if 4 * k <= most), default=min(curve))]
    left = before - curve[most]
    failed = (
        f"accuracy rises by {rise:.1%} with more steps: the attack is misled"
        if rise > TOLERANCE
        else f"four times as many steps still cost {left:.1%}: the attack has not converged, so the accuracy is too high"
    )
    return _result(
        "S5",
        rise <= TOLERANCE and left <= TOLERANCE,
        max(rise, left),
        "accuracy has converged in the number of steps",
        failed,
    )


def iterative_beats_single(iterative: float, single: float) -> CheckResult:
    """S6: PGD is at least as strong as FGSM."""
    gap = iterative - single
    return _result(
        "S6",
        gap <= BLACK_BOX_MARGIN,
        gap,
        f"PGD leaves {iterative:.1%}, one step {single:.1%}",
        f"one step leaves less ({single:.1%}) than PGD ({iterative:.1%}): gradients are masked",
    )


def restarts_add_little(one: float, ten: float) -> CheckResult:
    """S7: ten random starts against one."""
    gap = one - ten
    return _result(
        "S7",
        gap <= 2 * TOLERANCE,
        gap,
        f"ten starts instead of one cost {gap:.1%}",
        f"ten starts instead of one cost {gap:.1%}: one start is not enough here, read the worst case over attacks instead",
    )


def black_box_is_weaker(white_box: float, black_box: Mapping[str, float]) -> CheckResult:
    """S8: what needs no gradient must not beat what has it. ``{attack: accuracy}`` on the same images."""
    name, accuracy = min(black_box.items(), key=lambda item: item[1])
    gap = white_box - accuracy
    return _result(
        "S8",
        gap <= BLACK_BOX_MARGIN,
        gap,
        f"black-box attacks leave at least {accuracy:.1%} ({name}), gradient attacks {white_box:.1%}",
        f"{name} leaves {accuracy:.1%}, less than gradient attacks ({white_box:.1%}): gradients are masked",
    )


def noise_is_harmless(white_box: float, noise: float, benign: float) -> CheckResult:
    """S9: random points must do far less harm than the attack; half of what the attack breaks would be too much."""
    harm, attack_harm = benign - noise, benign - white_box
    share = harm / attack_harm if attack_harm > 0 else float(harm > 0)
    return _result(
        "S9",
        share <= 0.5,
        share,
        f"random noise breaks {harm:.1%}, the attack {attack_harm:.1%}",
        f"random noise breaks {harm:.1%}, the attack no more than {attack_harm:.1%}: it hardly searches",
    )


def gradients_are_alive(zero: float, rises: float, difference: float, probabilities: float) -> CheckResult:
    """S10: shares of images without gradient, whose loss the attack raises, and that look like probabilities; and how much two
    forwards differ."""
    faults = []
    if zero >= 0.01:
        faults.append(f"{zero:.1%} of the images have no gradient at all")
    if rises < 0.95:
        faults.append(f"the attack raises the loss on {rises:.1%} of the images only")
    if difference > SAME_LOGITS:
        faults.append(f"two forwards of one image differ by {difference:.2g}: the model is random, attack its average")
    if probabilities > 0.5:
        faults.append("the outputs are probabilities, not logits: their gradients vanish where the model is certain")
    return _result(
        "S10",
        not faults,
        zero,
        f"{zero:.1%} of the images have no gradient; the loss rises on {rises:.1%}; forwards differ by {difference:.1g}",
        "; ".join(faults),
    )


def worst_case_is_least(worst: float, members: Mapping[str, float]) -> CheckResult:
    """S11: the worst case per image is at most every attack's own accuracy."""
    least = min(members.values())
    return _result(
        "S11",
        worst <= least,
        worst - least,
        f"the worst case over {len(members)} attacks leaves {worst:.1%}, the strongest alone {least:.1%}",
        f"the worst case ({worst:.1%}) exceeds an attack's own accuracy ({least:.1%}): the images do not correspond",
    )


def enough_images(images: int, deployed: bool) -> CheckResult:
    """S12: on what, and on how much, the number was measured."""
    what = f"{images:,} images, on the weights that are deployed"
    fault = (
        f"{images:,} images; below 1,000 the 95 % half width exceeds 3 points"
        if deployed
        else "the weights attacked are not the ones that were exported"
    )
    return _result("S12", images >= 1000 and deployed, images, what, fault)


def planted_are_found(planted: float, found: float, by_chance: float) -> CheckResult:
    """S13: shares of images with a planted adversarial point, whose read-out the attack breaks, and that random corners break."""
    rate = found / planted if planted else 0.0
    corners = f"random corners: {by_chance / planted if planted else 0.0:.1%}"
    weak = (
        f"the attack finds only {rate:.1%} of adversarial points that are surely there ({corners}): it is too weak here"
    )
    return _result(
        "S13",
        planted > 0 and rate >= 0.95,
        rate,
        f"the attack finds {rate:.1%} of planted adversarial points ({corners})",
        weak if planted else "no adversarial point could be planted: the logits do not depend on the image",
    )


def collapse(collapsed: Sequence[bool]) -> CheckResult:
    """S14: a constant answer earns the majority share as benign *and* as robust accuracy."""
    count = sum(collapsed)
    which = ", ".join(str(client) for client, bad in enumerate(collapsed) if bad)
    return _result(
        "S14",
        count == 0,
        count / len(collapsed),
        "every client's robust accuracy exceeds what always answering its majority class would earn",
        f"{count} of {len(collapsed)} clients do no better under attack than always answering their majority class, "
        f"or predict one class only (clients {which}): their robust accuracy shows no defence",
    )


def predicts_one_class(predictions: np.ndarray, labels: np.ndarray) -> bool:
    """Whether a client answers one class only although its test images show more."""
    return len(np.unique(predictions)) == 1 and len(np.unique(labels)) > 1


def is_collapsed(robust_accuracy: float, majority_share: float, one_class: bool) -> bool:
    """The mark behind S14, for one client."""
    return one_class or robust_accuracy <= majority_share


def _result(name: str, passed: bool, value: float, good: str, bad: str) -> CheckResult:
    return CheckResult(name=name, passed=bool(passed), value=float(value), meaning=good if passed else bad)


def _largest_rise(curve: Mapping[float, float]) -> float:
    values = [curve[key] for key in sorted(curve)]
    return max((later - earlier for earlier, later in pairwise(values)), default=0.0)

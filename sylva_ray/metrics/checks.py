"""Checks of whether a measured robust accuracy is credible. Every result contains a sentence that explains it.

The numbers S1 to S14 are those of docs/checks.md. The checks follow Carlini et al. 2019 ("On Evaluating Adversarial
Robustness"), the checks of AutoAttack, and the binarization test of Zimmermann et al. 2022; S14 detects collapse under
label skew. A check is a function of measured values, which `sylva_ray.evaluation.run_checks` passes to it. Accuracies
and other fractions are in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from sylva_ray.attacks.pgd import default_step_size
from sylva_ray.core.summary import CheckResult
from sylva_ray.core.text import clients_text
from sylva_ray.core.types import AttackSpec
from sylva_ray.metrics.intervals import effective_images, fleet_interval, wilson_interval

UNBOUNDED = AttackSpec("pgd", epsilon=1.0, steps=20, step_size=default_step_size(1.0, 20))
"""The attack of S4: with epsilon 1 it can reach every image."""

S4_IMAGES = 32
"""Number of images per client for S4."""

TOLERANCE = 0.01
"""By how much an accuracy may rise along a curve that should fall."""

BLACK_BOX_MARGIN = 0.002
"""By how much a black-box attack may exceed the white-box attack: the threshold of AutoAttack."""

MIN_IMAGES = 5
"""A difference of fewer images between two attacks fails no check: a sign test on the images that one of them alone
fools (Dixon and Mood 1946) needs so many to tell it from chance at a level of 5 %."""

EASY_SHARE = 0.5
"""Share of the points of S13 that random search must not find: the attack is to be better than chance."""

REQUIRED_SHARE = 0.95
"""Share of the images on which the attack of S10 raises the loss, and that of S13 finds the planted point."""

SAME_LOGITS = 1e-4
"""Largest difference between the logits of two forwards of the same image: the threshold of AutoAttack."""


def threat_model_stated(threat_model: Mapping[str, str]) -> CheckResult:
    """Check S1: norm, attacks, precision and the knowledge of the attacker are stated."""
    required = ("norm", "evaluation", "knowledge", "precision")
    missing = [key for key in required if not threat_model.get(key)]
    stated = f"norm {threat_model.get('norm')}; {threat_model.get('knowledge')}"
    return _result("S1", not missing, len(missing), stated, f"the threat model does not state {', '.join(missing)}")


def epsilon_zero(clean: float, at_zero: float) -> CheckResult:
    """Check S2: an attack with epsilon 0 does not change the accuracy."""
    gap = abs(clean - at_zero)
    return _result(
        "S2",
        gap == 0,
        gap,
        "an attack with epsilon 0 does not change the benign accuracy",
        f"an attack with epsilon 0 changes the accuracy from {clean:.1%} to {at_zero:.1%}: predictions are random",
    )


def falls_with_epsilon(curve: Mapping[float, float], images: Sequence[int]) -> CheckResult:
    """Check S3: accuracy does not rise with epsilon.

    Args:
        curve: ``{epsilon: accuracy}``, means over clients.
        images: of each client.
    """
    rise = _largest_rise(curve)
    rises = f"accuracy rises by {rise:.1%} as epsilon grows"
    return _result(
        "S3",
        rise <= _tolerated(TOLERANCE, images),
        rise,
        "accuracy does not rise as epsilon grows" if rise <= TOLERANCE else _by_chance(rises, images),
        f"accuracy rises by {rise:.1%} as epsilon grows: the attack gets weaker, so gradients are masked",
    )


def unbounded_attack(
    accuracies: Mapping[int, float], num_classes: int, images: Sequence[int], distinct: int | None = None
) -> CheckResult:
    """Check S4: an attack with epsilon 1 reduces the accuracy to chance or below; otherwise gradients are masked.

    It fails where the mean over clients is above chance by more than the error of the few images: its 95 % interval is.
    It also fails where a single client is, which the mean may hide: by a binomial test at such a level that one of all
    clients fails by chance in 2.5 % of the runs at most (Bonferroni).

    Args:
        accuracies: under the attack, by the number of the client.
        num_classes: chance is one in so many.
        images: of each of these clients, in the same order.
        distinct: images without repetition; None: no two clients have the same.
    """
    from scipy.stats import binom  # slow to import, and only this check needs it

    chance, mean = 1 / num_classes, float(np.mean(list(accuracies.values())))
    low, high = fleet_interval(mean, images, distinct)
    count = sum(images) if distinct is None else distinct
    measured = f"{mean:.1%} standing ({low:.1%} to {high:.1%} on {count:,} images)"
    is_below = mean <= chance
    bound = "at most chance" if is_below else "not above chance by more than the error of so few images:"
    fault = f"an attack without bound still leaves {measured}, above chance ({chance:.1%})"
    counts = np.rint(np.array(list(accuracies.values())) * images)
    is_unlikely = binom.sf(counts - 1, images, chance) < 0.025 / len(accuracies)
    standing = [client for client, unlikely in zip(accuracies, is_unlikely, strict=True) if unlikely]
    is_chance = is_below or low <= chance
    if is_chance and standing:
        fault = (
            f"an attack without bound leaves {measured} in the mean, but more than chance ({chance:.1%}) of "
            f"{clients_text(standing)}, up to {max(accuracies[client] for client in standing):.1%}"
        )
    return _result(
        "S4",
        is_chance and not standing,
        mean,
        f"an attack without bound leaves {measured}, {bound} {chance:.1%}",
        f"{fault}: gradients are masked or the prediction is constant, so the robust accuracies below are too high",
    )


def falls_with_steps(curve: Mapping[float, float], images: Sequence[int]) -> CheckResult:
    """Check S5: accuracy does not rise with the number of steps, and four times as many steps hardly reduce it.

    Args:
        curve: ``{steps: accuracy}``, means over clients.
        images: of each client.
    """
    rise = _largest_rise(curve)
    max_steps = max(curve)
    before = curve[max((steps for steps in curve if 4 * steps <= max_steps), default=min(curve))]
    drop = before - curve[max_steps]
    tolerated = _tolerated(TOLERANCE, images)
    rises = f"accuracy rises by {rise:.1%} with more steps"
    drops = f"four times as many steps reduce it by {drop:.1%}"
    return _result(
        "S5",
        max(rise, drop) <= tolerated,
        max(rise, drop),
        "accuracy has converged in the number of steps"
        if max(rise, drop) <= TOLERANCE
        else _by_chance(rises if rise > drop else drops, images),
        f"{rises}: gradients are masked"
        if rise > tolerated
        else f"{drops}: the attack has not converged, the accuracy is too high",
    )


def iterative_beats_single(iterative: float, single: float, images: Sequence[int]) -> CheckResult:
    """Check S6: PGD is at least as strong as FGSM. ``images`` are those of each client."""
    gap = iterative - single
    measured = f"accuracy is {iterative:.1%} under PGD, {single:.1%} under one step"
    return _result(
        "S6",
        gap <= _tolerated(BLACK_BOX_MARGIN, images),
        gap,
        measured if gap <= BLACK_BOX_MARGIN else _by_chance(measured, images),
        f"one step is stronger ({single:.1%}) than PGD ({iterative:.1%}): gradients are masked",
    )


def restarts_add_little(one: float, ten: float, images: Sequence[int]) -> CheckResult:
    """Check S7: ten random starts are hardly stronger than one. ``images`` are those of each client."""
    gap = one - ten
    measured = f"ten starts instead of one reduce the accuracy by {gap:.1%}"
    return _result(
        "S7",
        gap <= _tolerated(2 * TOLERANCE, images),
        gap,
        measured if gap <= 2 * TOLERANCE else _by_chance(measured, images),
        f"{measured}: one is not enough, use the worst case instead",
    )


def black_box_is_weaker(white_box: float, black_box: Mapping[str, float], images: Sequence[int]) -> CheckResult:
    """Check S8: attacks without gradients are not stronger.

    Args:
        white_box: accuracy in the worst case over attacks with gradients.
        black_box: ``{attack: accuracy}``.
        images: of each client.
    """
    name, accuracy = min(black_box.items(), key=lambda item: item[1])
    gap = white_box - accuracy
    measured = f"accuracy is {accuracy:.1%} under black-box attacks ({name}), {white_box:.1%} under gradient attacks"
    return _result(
        "S8",
        gap <= _tolerated(BLACK_BOX_MARGIN, images),
        gap,
        measured if gap <= BLACK_BOX_MARGIN else _by_chance(measured, images),
        f"{name} is stronger ({accuracy:.1%}) than gradient attacks ({white_box:.1%}): gradients are masked",
    )


def noise_is_harmless(white_box: float, noise: float, benign: float, images: Sequence[int]) -> CheckResult:
    """Check S9: random noise breaks at most half as many images as the attack. ``images`` are those of each client."""
    by_noise, by_attack = benign - noise, benign - white_box
    ratio = by_noise / by_attack if by_attack > 0 else float(by_noise > 0)
    measured = f"random noise breaks {by_noise:.1%}, the attack {by_attack:.1%}"
    if by_attack <= 0 and by_noise <= 0:
        measured += ": nothing broke, so that this says nothing"
    return _result(
        "S9",
        ratio <= 0.5 or by_noise - by_attack / 2 <= _tolerated(0, images),
        ratio,
        measured if ratio <= 0.5 else _by_chance(measured, images),
        f"random noise breaks {by_noise:.1%}, the attack only {by_attack:.1%}: the attack is hardly better than chance",
    )


def gradients_are_useful(
    zero: float, rises: float, difference: float, probabilities: float, images: Sequence[int]
) -> CheckResult:
    """Check S10: gradients exist, the attack raises the loss, and the model is deterministic and returns logits.

    Args:
        zero: fraction of the images whose gradient is zero or not finite.
        rises: fraction of the images whose loss the attack raises.
        difference: largest difference between the logits of repeated forwards.
        probabilities: fraction of the images whose logits look like probabilities.
        images: of each client. The loss has to rise on 95 % of them, within the error of so many (95 % interval).
    """
    faults = []
    if zero >= 0.01:
        faults.append(f"{zero:.1%} of the images have a gradient that is zero or not finite")
    if wilson_interval(rises, sum(images))[1] < REQUIRED_SHARE:
        faults.append(f"the attack raises the loss on only {rises:.1%} of the images")
    if math.isnan(difference):
        faults.append("logits are not numbers")
    elif difference > SAME_LOGITS:
        faults.append(
            f"two forwards of one image differ by {difference:.2g}: the model is random, attack its average instead"
        )
    if probabilities > 0.5:
        faults.append("the outputs are probabilities, not logits: gradients vanish where the model is confident")
    return _result(
        "S10",
        not faults,
        zero,
        f"no gradient on {zero:.1%} of the images; the loss rises on {rises:.1%}{_short_by_chance(rises, images)}; "
        f"forwards differ by {difference:.1g}",
        "; ".join(faults),
    )


def worst_case_is_least(worst: float, members: Mapping[str, float]) -> CheckResult:
    """Check S11: the worst case per image is at most the accuracy under every single attack."""
    lowest = min(members.values())
    return _result(
        "S11",
        worst <= lowest,
        worst - lowest,
        f"accuracy is {worst:.1%} in the worst case over {len(members)} attacks, {lowest:.1%} under the strongest one",
        f"the worst case ({worst:.1%}) exceeds the accuracy under one attack ({lowest:.1%}): the images differ",
    )


def enough_images(images: int, exported: int | None) -> CheckResult:
    """Check S12: at least 1,000 images were used, and the attacked weights are those that are exported.

    Args:
        images: of all clients.
        exported: how many exported adapters are the attacked weights, bit for bit; None: one of them is not.
    """
    what = f"of {exported:,} exported adapters" if exported else "of the run, of which none are exported"
    good = f"{images:,} images, on the weights {what}"
    fault = (
        f"{images:,} images; below 1,000 the half-width of the 95 % interval exceeds 3 points"
        if exported is not None
        else "the attacked weights are not the ones that were exported"
    )
    return _result("S12", images >= 1000 and exported is not None, images, good, fault)


def planted_points_are_found(planted: float, found: float, by_chance: float, images: Sequence[int]) -> CheckResult:
    """Check S13: the attack finds adversarial points that are known to exist, see `binarization_test`.

    Args:
        planted: fraction of the images with such a point.
        found: fraction of the images on which the attack finds it.
        by_chance: fraction of the images on which random search finds it. Where it finds most of them, the points are
            too easy to find, and the attack's share says nothing.
        images: of each client. The attack has to find 95 % of the points, within their error (95 % interval).
    """
    rate, chance = (share / planted if planted else 0.0 for share in (found, by_chance))
    corners = f"random corners: {chance:.1%}"
    points = planted * sum(images)
    is_easy = bool(points) and wilson_interval(chance, points)[0] > EASY_SHARE
    fault = f"the attack finds only {rate:.1%} of the points that are known to exist ({corners}): it is too weak"
    if is_easy:
        fault = f"random corners find {chance:.1%} of the points that are known to exist: they are too easy to find"
    if not planted:
        fault = "no adversarial point exists: within this budget the logits do not depend on the image"
    return _result(
        "S13",
        planted > 0 and not is_easy and wilson_interval(rate, points)[1] >= REQUIRED_SHARE,
        rate,
        f"the attack finds {rate:.1%} of the adversarial points that are known to exist, on {planted:.1%} of the images"
        f" ({corners}){_short_by_chance(rate, images)}",
        fault,
    )


def collapse(collapsed: Sequence[bool], left_out: Collection[int] = ()) -> CheckResult:
    """Check S14: no client has the robust accuracy of a constant prediction.

    Args:
        collapsed: of every client, whether it has.
        left_out: clients that do not count, because they are Byzantine; none of them has collapsed.
    """
    count, num_clients = sum(collapsed), len(collapsed) - len(left_out)
    which = clients_text(client for client, bad in enumerate(collapsed) if bad)
    return _result(
        "S14",
        count == 0,
        count / num_clients,
        "every client's robust accuracy exceeds what always answering its majority class would earn",
        f"{count} of {num_clients} clients do no better under attack than always answering their majority class, "
        f"or predict one class only ({which}): their robust accuracy shows no defence",
    )


def predicts_one_class(predictions: np.ndarray, labels: np.ndarray) -> bool:
    """Return whether all predictions are the same class although there are several among the labels."""
    return len(np.unique(predictions)) == 1 and len(np.unique(labels)) > 1


def is_collapsed(robust_accuracy: float, majority_share: float, one_class: bool) -> bool:
    """Return whether a client fails S14: it predicts one class, or its accuracy is at most the majority share.

    Nothing can be said of a client that is tested on its majority class alone.
    """
    return one_class or (majority_share < 1 and robust_accuracy <= majority_share)


def _result(name: str, passed: bool, value: float, good: str, bad: str) -> CheckResult:
    return CheckResult(name=name, passed=bool(passed), value=float(value), meaning=good if passed else bad)


def _tolerated(margin: float, images: Sequence[int]) -> float:
    """Return how large a difference of accuracies fails no check: the margin, or what may be chance."""
    return max(margin, (MIN_IMAGES - 0.5) / effective_images(images))


def _by_chance(measured: str, images: Sequence[int]) -> str:
    return f"{measured}: fewer than {MIN_IMAGES} of {sum(images):,} images, which may be chance"


def _short_by_chance(share: float, images: Sequence[int]) -> str:
    if share >= REQUIRED_SHARE:
        return ""
    return f", below {REQUIRED_SHARE:.0%} by no more than the error of so few images ({sum(images):,})"


def _largest_rise(curve: Mapping[float, float]) -> float:
    """Return by how much a later point exceeds the lowest one before it, at most; many small rises are a large one."""
    values = np.array([curve[key] for key in sorted(curve)])
    return float((values - np.minimum.accumulate(values)).max(initial=0.0))

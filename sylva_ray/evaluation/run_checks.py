"""Run the checks S1 to S14 on measurements of a subset of every client's images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sylva_ray.core.summary import CheckResult
from sylva_ray.evaluation.plan import EPSILONS, STEPS, check_attacks, epsilon_curve, steps_curve
from sylva_ray.evaluation.tables import Measured, worst_answers
from sylva_ray.metrics import checks


@dataclass(frozen=True)
class RunFacts:
    """Facts about the run that the checks use.

    Attributes:
        epsilon: budget of the main attacks, pixel units.
        num_classes: of the data set.
        threat_model: in words, as in ``evaluation.json``.
        images: distinct images on which the reported accuracies were measured.
        exported: how many exported adapters are the attacked weights, bit for bit; None: one of them is not.
        collapsed: whether each client is no better than a constant answer.
        left_out: the Byzantine clients.
    """

    epsilon: float
    num_classes: int
    threat_model: Mapping[str, str]
    images: int
    exported: int | None
    collapsed: Sequence[bool]
    left_out: Collection[int] = ()


def run_checks(
    measured: Measured, probes: Mapping[str, float], run: RunFacts, transfer: float | None = None
) -> list[CheckResult]:
    """Run all fourteen checks, in order.

    Args:
        measured: both curves and `check_attacks` on the same images, without the clients that are left out.
        probes: means over images of `sylva_ray.metrics.probe`; ``difference`` is the largest.
        run: facts about the run.
        transfer: accuracy under the strongest transfer attack, if there was one.
    """
    epsilon, num_classes = run.epsilon, run.num_classes
    by_epsilon = {e: measured.mean(spec.label) for e, spec in zip(EPSILONS, epsilon_curve(), strict=True)}
    by_steps = {float(k): measured.mean(spec.label) for k, spec in zip(STEPS, steps_curve(epsilon), strict=True)}
    labels = {name: spec.label for name, spec in check_attacks(epsilon, num_classes).items()}
    accuracies = {name: measured.mean(label) for name, label in labels.items()}
    benign, images = measured.mean("benign"), [len(y) for y in measured.labels]
    honest = [client for client in range(len(run.collapsed)) if client not in run.left_out]
    standing = [float(correct.mean()) for correct in measured.correct(labels["unbounded"])]
    gradient = ["pgd", "restarts", "apgd", "targeted"]
    white_box = _mean_accuracy(worst_answers(measured, [labels[name] for name in gradient]), measured.labels)
    members = {labels[name]: accuracies[name] for name in (*gradient, "fgsm", "square", "noise")}
    worst = _mean_accuracy(worst_answers(measured, list(members)), measured.labels)
    black_box = {"square": accuracies["square"], "noise": accuracies["noise"]}
    if transfer is not None:
        black_box["transfer"] = transfer
    return [
        checks.threat_model_stated(run.threat_model),
        checks.epsilon_zero(benign, by_epsilon[0.0]),
        checks.falls_with_epsilon(by_epsilon, images),
        checks.unbounded_attack(dict(zip(honest, standing, strict=True)), num_classes, images, measured.distinct),
        checks.falls_with_steps(by_steps, images),
        checks.iterative_beats_single(accuracies["pgd"], accuracies["fgsm"], images),
        checks.restarts_add_little(accuracies["pgd"], accuracies["restarts"], images),
        checks.black_box_is_weaker(white_box, black_box, images),
        checks.noise_is_harmless(white_box, accuracies["noise"], benign, images),
        checks.gradients_are_useful(
            probes["zero_gradient"], probes["rises"], probes["difference"], probes["probabilities"], images
        ),
        checks.worst_case_is_least(worst, members),
        checks.enough_images(run.images, run.exported),
        checks.planted_points_are_found(probes["planted"], probes["found"], probes["by_chance"], images),
        checks.collapse(run.collapsed, run.left_out),
    ]


def _mean_accuracy(answers: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> float:
    return float(np.mean([np.mean(a == y) for a, y in zip(answers, labels, strict=True)]))

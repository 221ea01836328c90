"""From answers, image by image, to the page of numbers in ``evaluation.json`` (schema in docs/evaluate.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import binomtest

from sylva_ray.attacks.base import epsilon_text
from sylva_ray.core.evaluation import AttackRow, AttackSettings, ConditionRow, Curve, PerClass, WorstCaseRow
from sylva_ray.core.summary import Spread
from sylva_ray.core.types import AttackSpec
from sylva_ray.metrics.accuracy import accuracy, balanced_accuracy

PerClient = Sequence[np.ndarray]
"""One array per client, ``[n_i]`` each."""


@dataclass
class Cost:
    """What an attack cost: images that went forward and backward, and workers' seconds (0 where all was read from disk)."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    timed_images: int = 0


@dataclass
class Measured:
    """Answers on the same images under every condition: ``answers[condition][client] [n]``, ``distances`` likewise."""

    labels: list[np.ndarray]
    answers: dict[str, list[np.ndarray]] = field(default_factory=dict)
    distances: dict[str, list[np.ndarray]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)

    def right(self, condition: str) -> list[np.ndarray]:
        """``[client] [n] bool``."""
        return [a == y for a, y in zip(self.answers[condition], self.labels, strict=True)]

    def without(self, clients: Sequence[int]) -> Measured:
        """The same of all other clients: attackers of the aggregation are nobody's headline."""

        def others(values: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
            return {name: [v for c, v in enumerate(own) if c not in clients] for name, own in values.items()}

        labels = [own for client, own in enumerate(self.labels) if client not in clients]
        return Measured(labels, others(self.answers), others(self.distances), self.costs)

    def mean(self, condition: str) -> float:
        """Mean accuracy over clients."""
        return float(np.mean([own.mean() for own in self.right(condition)]))


def interval(right: PerClient, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of the accuracy over all clients' images together.

    Args:
        right: whether each image is answered right, ``[n_i] bool`` per client.
        confidence: of the interval, in (0, 1).
    """
    flat = np.concatenate(list(right))
    found = binomtest(int(flat.sum()), len(flat)).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def condition_row(answers: PerClient, labels: PerClient, left_out: Sequence[int]) -> ConditionRow:
    """Measure one condition.

    Args:
        answers: class numbers of all K clients.
        labels: the right ones.
        left_out: clients that count in no statistic.
    """
    pairs = list(zip(answers, labels, strict=True))
    honest = [a == y for client, (a, y) in enumerate(pairs) if client not in left_out]
    return ConditionRow(
        accuracy=Spread.from_values([accuracy(a, y) for a, y in pairs], left_out),
        balanced_accuracy=Spread.from_values([balanced_accuracy(a, y) for a, y in pairs], left_out),
        interval=interval(honest),
        images=int(sum(map(len, honest))),
    )


def attack_row(spec: AttackSpec, measured: Measured, left_out: Sequence[int]) -> AttackRow:
    """Measure one attack: `condition_row`, and what the attack was, found and cost."""
    label = spec.label
    row = condition_row(measured.answers[label], measured.labels, left_out)
    median = float(np.median(np.concatenate(measured.distances[label])))
    cost = measured.costs[label]
    return AttackRow(
        accuracy=row.accuracy,
        balanced_accuracy=row.balanced_accuracy,
        interval=row.interval,
        images=row.images,
        settings=AttackSettings.from_spec(spec),
        median_distance=median if np.isfinite(median) else None,
        forwards=cost.forwards,
        backwards=cost.backwards,
        seconds=cost.seconds,
        images_per_second=cost.timed_images / cost.seconds if cost.seconds else None,
    )


def worst_cases(specs: Sequence[AttackSpec], measured: Measured, left_out: Sequence[int]) -> dict[str, WorstCaseRow]:
    """Measure the worst case over the attacks of each budget (norm and epsilon) that has more than one.

    An image counts as right where it is right under all of them.
    """
    groups: dict[str, list[AttackSpec]] = {}
    for spec in specs:
        if np.isfinite(spec.epsilon):
            groups.setdefault(budget_name(spec), []).append(spec)
    found = {}
    for name, members in groups.items():
        if len(members) > 1:
            worst = worst_answers(measured, [spec.label for spec in members])
            row = condition_row(worst, measured.labels, left_out)
            found[name] = WorstCaseRow(
                accuracy=row.accuracy,
                balanced_accuracy=row.balanced_accuracy,
                interval=row.interval,
                images=row.images,
                attacks=[spec.label for spec in members],
            )
    return found


def worst_answers(measured: Measured, conditions: Sequence[str]) -> list[np.ndarray]:
    """``[client] [n]``: the first wrong answer among the conditions, else the label."""
    worst = [own.copy() for own in measured.labels]
    for condition in conditions:
        for own, answers, y in zip(worst, measured.answers[condition], measured.labels, strict=True):
            falls = (own == y) & (answers != y)
            own[falls] = answers[falls]
    return worst


def budget_name(spec: AttackSpec) -> str:
    """``linf-eps8`` (of 255), ``l2-eps0.5``, ``l0-eps20``."""
    return f"{spec.norm}-eps{epsilon_text(spec)}"


def per_class(measured: Measured, worst: PerClient, num_classes: int) -> PerClass:
    """Recall by true class over all clients' images, benign and in the worst case; None where a class does not occur."""
    labels = np.concatenate(measured.labels)

    def recall(answers: PerClient) -> list[float | None]:
        flat = np.concatenate(list(answers))
        return [float(np.mean(flat[labels == c] == c)) if np.any(labels == c) else None for c in range(num_classes)]

    return PerClass(
        images=[int(np.sum(labels == c)) for c in range(num_classes)],
        benign=recall(measured.answers["benign"]),
        worst_case=recall(worst),
    )


def curve(points: Mapping[float, AttackSpec], measured: Measured) -> Curve:
    """``x``, the fleet's mean accuracy and every client's at each x."""
    rows = [[float(own.mean()) for own in measured.right(spec.label)] for spec in points.values()]
    return Curve(
        x=list(points),
        mean=[float(np.mean(row)) for row in rows],
        per_client=np.array(rows).T.tolist(),
        images=int(sum(map(len, measured.labels))),
    )

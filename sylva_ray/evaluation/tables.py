"""Compute the numbers of ``evaluation.json`` (docs/summary.md) from the predicted classes of all images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sylva_ray.attacks.base import epsilon_text
from sylva_ray.core.evaluation import AttackRow, AttackSettings, ConditionRow, Curve, PerClass, WorstCaseRow
from sylva_ray.core.summary import Spread
from sylva_ray.core.types import AttackSpec
from sylva_ray.federation.client.measuring import EvaluateOutcome
from sylva_ray.metrics.accuracy import accuracy, balanced_accuracy
from sylva_ray.metrics.intervals import fleet_interval

PerClient = Sequence[np.ndarray]
"""One array per client, ``[n_i]`` each."""


@dataclass
class Cost:
    """The cost of an attack.

    Attributes:
        forwards: images that were passed forward.
        backwards: images that were passed backward.
        seconds: worker seconds of what was measured now; 0 where all was in the cache.
        timed_images: images that these seconds were spent on.
    """

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    timed_images: int = 0

    def add(self, outcomes: Sequence[EvaluateOutcome], label: str, seconds: float) -> None:
        """Add a task.

        Args:
            outcomes: of the clients in its cohort.
            label: of the attack.
            seconds: worker seconds; 0 where the outcomes were in the cache.
        """
        forwards, backwards = outcomes[0].passes.get(label, (0, 0))
        self.forwards += forwards
        self.backwards += backwards
        if seconds:
            self.seconds += seconds
            self.timed_images += sum(len(outcome.predictions.get("benign", ())) for outcome in outcomes)


@dataclass
class Measured:
    """Predictions for the same images under every condition, ``benign`` or the label of an attack.

    Attributes:
        labels: true classes, ``[client] [n]``.
        answers: predicted classes, ``{condition: [client] [n]}``.
        distances: of the smallest successful perturbations, ``{attack: [client] [n]}``; infinite where there is none.
        costs: of the attacks.
        distinct: images of all honest clients without repetition; None: no two clients have the same.
    """

    labels: list[np.ndarray]
    answers: dict[str, list[np.ndarray]] = field(default_factory=dict)
    distances: dict[str, list[np.ndarray]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    distinct: int | None = None

    def correct(self, condition: str) -> list[np.ndarray]:
        """Return which predictions are correct, ``[client] [n] bool``."""
        return [a == y for a, y in zip(self.answers[condition], self.labels, strict=True)]

    def without(self, clients: Sequence[int]) -> Measured:
        """Return the same without some clients; the costs stay those of all."""

        def others(by_client: list[np.ndarray]) -> list[np.ndarray]:
            return [values for client, values in enumerate(by_client) if client not in clients]

        answers = {condition: others(by_client) for condition, by_client in self.answers.items()}
        distances = {attack: others(by_client) for attack, by_client in self.distances.items()}
        return Measured(others(self.labels), answers, distances, self.costs, self.distinct)

    def mean(self, condition: str) -> float:
        """Return the mean accuracy over clients."""
        return float(np.mean([correct.mean() for correct in self.correct(condition)]))


def condition_row(
    answers: PerClient, labels: PerClient, left_out: Sequence[int], distinct: int | None = None
) -> ConditionRow:
    """Summarise one condition.

    Args:
        answers: predicted classes, ``[client] [n]``.
        labels: true classes, likewise.
        left_out: clients that count in no statistic.
        distinct: as in `Measured`.
    """
    pairs = list(zip(answers, labels, strict=True))
    images = [len(y) for client, y in enumerate(labels) if client not in left_out]
    overall = Spread.from_values([accuracy(a, y) for a, y in pairs], left_out)
    return ConditionRow(
        accuracy=overall,
        balanced_accuracy=Spread.from_values([balanced_accuracy(a, y) for a, y in pairs], left_out),
        interval=fleet_interval(overall.mean, images, distinct),
        images=sum(images),
    )


def attack_row(spec: AttackSpec, measured: Measured, left_out: Sequence[int]) -> AttackRow:
    """Summarise one attack: as `condition_row`, with its settings, distances and cost.

    Distances are those of images that are classified correctly without an attack: the others need none.
    """
    label, counted = spec.label, measured.without(left_out)
    row = condition_row(measured.answers[label], measured.labels, left_out, measured.distinct)
    pairs = zip(counted.distances[label], counted.correct("benign"), strict=True)
    needed = np.concatenate([distances[is_correct] for distances, is_correct in pairs])
    median = float(np.median(needed)) if len(needed) else np.inf
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
    """Summarise the worst case over the attacks of each budget (norm and epsilon) that has more than one.

    A prediction counts as correct where it is correct under all of them.

    Returns:
        ``{budget: row}``, see `budget_name`.
    """
    groups: dict[str, list[AttackSpec]] = {}
    for spec in specs:
        if np.isfinite(spec.epsilon):
            groups.setdefault(budget_name(spec), []).append(spec)
    rows = {}
    for name, members in groups.items():
        if len(members) > 1:
            worst = worst_answers(measured, [spec.label for spec in members])
            row = condition_row(worst, measured.labels, left_out, measured.distinct)
            rows[name] = WorstCaseRow(
                accuracy=row.accuracy,
                balanced_accuracy=row.balanced_accuracy,
                interval=row.interval,
                images=row.images,
                attacks=[spec.label for spec in members],
            )
    return rows


def worst_answers(measured: Measured, conditions: Sequence[str]) -> list[np.ndarray]:
    """Return the first wrong prediction among the conditions, else the label, ``[client] [n]``."""
    worst = [labels.copy() for labels in measured.labels]
    for condition in conditions:
        for client_worst, answers, labels in zip(worst, measured.answers[condition], measured.labels, strict=True):
            is_first = (client_worst == labels) & (answers != labels)
            client_worst[is_first] = answers[is_first]
    return worst


def budget_name(spec: AttackSpec) -> str:
    """Return the name of an attack's budget: ``linf-eps8`` (of 255), ``l2-eps0.5``, ``l0-eps20``."""
    return f"{spec.norm}-eps{epsilon_text(spec)}"


def per_class(measured: Measured, worst: PerClient, num_classes: int) -> PerClass:
    """Compute the recall by true class over all images of some clients; None where a class does not occur.

    Args:
        measured: has the labels and the benign predictions of these clients.
        worst: `worst_answers` of them.
        num_classes: of the data.
    """
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
    """Summarise accuracy against a setting of the attack.

    Args:
        points: ``{value of the setting: attack}``.
        measured: has these attacks.
    """
    rows = [[float(correct.mean()) for correct in measured.correct(spec.label)] for spec in points.values()]
    return Curve(
        x=list(points),
        mean=[float(np.mean(row)) for row in rows],
        per_client=np.array(rows).T.tolist(),
        images=int(sum(map(len, measured.labels))),
    )

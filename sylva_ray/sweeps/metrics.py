"""What a trial reports after every step, under names that all trials of a sweep share, whatever attacks they use."""

from __future__ import annotations

from collections.abc import Sequence

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Spread
from sylva_ray.transport.byzantine import byzantine_clients

ACCURACIES = ("benign_accuracy", "robust_accuracy", "benign_balanced_accuracy", "robust_balanced_accuracy")
WORST = "worst_decile"
COSTS = ("total_bytes", "seconds")
METRICS = (*ACCURACIES, *(f"{name}.{WORST}" for name in ACCURACIES), *COSTS)
"""Accuracies in [0, 1]: mean of the clients, or of their worst tenth. Costs so far: bytes up and down, wall seconds."""


def needs_attack(metric: str) -> bool:
    """Return whether a metric is measured under attack."""
    return metric.startswith("robust")


def step_metrics(records: Sequence[StageRecord], config: ExperimentConfig) -> dict[str, float]:
    """Return the newest known metrics after the last of ``records``.

    An accuracy that was not measured in the last step keeps its value. Robust accuracies are under the first of
    ``evaluation.attacks``, which is measured at every evaluation. Byzantine clients do not count. Before the first
    evaluation there are only costs.

    Args:
        records: of all steps so far, at least one.
        config: of the trial.
    """
    values = {
        "total_bytes": float(sum(record.upload_bytes + record.download_bytes for record in records)),
        "seconds": float(sum(record.seconds["wall"] for record in records)),
    }
    record = next((record for record in reversed(records) if record.evaluation), None)
    if record is None or record.evaluation is None:
        return values
    conditions = {"benign": "benign"}
    if config.evaluation.attacks:
        conditions["robust"] = config.evaluation.specs[0].label
    attackers = record.places_of(byzantine_clients(config))
    for name, condition in conditions.items():
        for kind in ("accuracy", "balanced_accuracy"):
            fleet = Spread.from_values(getattr(record.evaluation[condition], kind), attackers)
            values |= {f"{name}_{kind}": fleet.mean, f"{name}_{kind}.{WORST}": fleet.worst_decile}
    return values


def busy_seconds(records: Sequence[StageRecord]) -> float:
    """Return the seconds that a trial's workers spent computing, summed over the workers."""
    return sum(sum(record.worker_seconds.values()) for record in records)

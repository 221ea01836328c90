"""Accuracies from predictions, and how they spread over the fleet. All values are fractions in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sylva_ray.metrics.checks import predicts_one_class


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers."""
    return float(np.mean(predictions == labels))


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean recall over the classes that occur in ``labels``: a constant predictor earns 1 / classes, however skewed."""
    return float(np.mean([np.mean(predictions[labels == c] == c) for c in np.unique(labels)]))


def evaluate_client(predictions: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """``{condition: {accuracy, balanced_accuracy}}`` of one client; ``benign`` also tells whether one class is all it says."""
    result = {
        condition: {"accuracy": accuracy(p, labels), "balanced_accuracy": balanced_accuracy(p, labels)}
        for condition, p in predictions.items()
    }
    result["benign"]["one_class"] = float(predicts_one_class(predictions["benign"], labels))
    return result


def fleet_table(clients: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Per-client results -> ``{condition: {metric: [K]}}``, the form in which a record keeps them."""
    return {c: {m: [client[c][m] for client in clients] for m in clients[0][c]} for c in clients[0]}


def spread(values: Sequence[float], left_out: Sequence[int] = ()) -> dict[str, Any]:
    """Mean, std, min, 10th percentile, mean of the worst tenth (at least one client), median, max, and all K values.

    Clients in ``left_out`` (attackers) are listed but count in no statistic."""
    v = np.sort(np.delete(np.asarray(values, float), list(left_out)))
    worst = v[: max(1, len(v) // 10)]
    return {
        "mean": float(v.mean()),
        "std": float(v.std()),
        "min": float(v[0]),
        "p10": float(np.percentile(v, 10)),
        "worst_decile": float(worst.mean()),
        "median": float(np.median(v)),
        "max": float(v[-1]),
        "per_client": [float(value) for value in values],
    }

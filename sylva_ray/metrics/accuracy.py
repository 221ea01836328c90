"""Accuracies of clients from their predictions. All values are fractions in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sylva_ray.core.records import ClientAccuracies
from sylva_ray.metrics.checks import predicts_one_class


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of correct predictions."""
    return float(np.mean(predictions == labels))


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean recall over the classes in ``labels``; for a constant prediction it is 1 / number of classes."""
    return float(np.mean([np.mean(predictions[labels == c] == c) for c in np.unique(labels)]))


@dataclass(frozen=True)
class ConditionAccuracy:
    """The accuracies of one client under one condition.

    Attributes:
        accuracy: fraction of correct predictions.
        balanced_accuracy: mean recall over the classes of the labels.
        one_class: see `predicts_one_class`; None if it was not computed.
    """

    accuracy: float
    balanced_accuracy: float
    one_class: bool | None = None


def evaluate_client(predictions: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, ConditionAccuracy]:
    """Compute the accuracies of one client.

    Args:
        predictions: ``{condition: [n]}``; one of the conditions is ``benign``.
        labels: ``[n]``.

    Returns:
        ``{condition: accuracies}``; ``one_class`` is computed for ``benign`` only.
    """
    return {
        condition: ConditionAccuracy(
            accuracy(classes, labels),
            balanced_accuracy(classes, labels),
            predicts_one_class(classes, labels) if condition == "benign" else None,
        )
        for condition, classes in predictions.items()
    }


def fleet_table(clients: Sequence[Mapping[str, ConditionAccuracy]]) -> dict[str, ClientAccuracies]:
    """Collect the accuracies of K clients in lists over clients, the form of a record."""
    return {
        condition: ClientAccuracies(
            accuracy=[client[condition].accuracy for client in clients],
            balanced_accuracy=[client[condition].balanced_accuracy for client in clients],
            one_class=[float(client[condition].one_class or 0) for client in clients]
            if condition == "benign"
            else None,
        )
        for condition in clients[0]
    }

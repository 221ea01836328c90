"""Accuracies with the class shares of a client's own images, from test images with equal shares.

The accuracy of every class counts as much as the class has of the client's training images (post-stratification).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ledger import RESULT, run_name

from sylva_ray.metrics.predictions import read_correct, read_labels
from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.compare import Row
from sylva_ray.reports.compare.tables import percent_cell
from sylva_ray.reports.compare.verdicts import method_rows, strongest_attack
from sylva_ray.storage.run_folder import RunFolder

Spread = tuple[float, float]
"""Mean, and worst decile of the clients."""


def weighted_accuracies(
    correct: Sequence[np.ndarray], labels: Sequence[np.ndarray], counts: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return the accuracy of every client with the class shares of its training images, ``[K]``.

    Args:
        correct: predictions that are correct, ``[client] [n] bool``.
        labels: of the same images, ``[client] [n]``.
        counts: training images, ``[client] [class]``. A class without a test image does not count.
    """
    accuracies = []
    for outcomes, y, own in zip(correct, labels, counts, strict=True):
        classes = np.unique(y)
        recalls = [outcomes[y == label].mean() for label in classes]
        accuracies.append(np.average(recalls, weights=np.asarray(own)[classes]))
    return np.array(accuracies)


def own_shares_table(results: Path, regime: str, rows: Sequence[Row]) -> str:
    """Write the benign accuracy of all methods and that under the strongest attack, with the clients' own shares."""
    attack = strongest_attack(rows)
    if attack is None:
        return "Not all runs of this regime have finished."
    lines = [f"| method | benign | {attack} |", "|---|---:|---:|"]
    for row in method_rows(rows):
        if row.stage == "final":
            folders = [results / run_name(row.name, regime, seed) for seed in row.seeds]
            cells = [_cell([_spread(folder, condition) for folder in folders]) for condition in ("benign", attack)]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(folder: Path, condition: str) -> Spread:
    result: Mapping[str, Sequence[Sequence[int]]] = json.loads((folder / RESULT).read_text())
    run = RunFolder(folder)
    accuracies = np.sort(weighted_accuracies(read_correct(run, condition), read_labels(run), result["label_matrix"]))
    return float(accuracies.mean()), float(accuracies[: max(1, round(len(accuracies) / 10))].mean())


def _cell(spreads: Sequence[Spread]) -> str:
    means = [SeedMean.from_values(values) for values in zip(*spreads, strict=True)]
    return "/".join(percent_cell(value) for value in means if value is not None)

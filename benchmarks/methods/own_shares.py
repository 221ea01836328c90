"""Accuracies with the class shares of a client's own images, from test images with equal shares.

The accuracy of every class counts as much as the class has of the client's training images (post-stratification).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ledger import RESULT, run_name

from sylva_ray.metrics.predictions import read_correct, read_labels
from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.compare import Row
from sylva_ray.reports.compare.tables import percent_cell
from sylva_ray.reports.compare.verdicts import method_rows, strongest_attack
from sylva_ray.storage.run_folder import RunFolder


def weighted_accuracies(correct: Sequence[np.ndarray], labels: Sequence[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Return the accuracy of every client with the class shares of its training images, ``[K]``.

    Args:
        correct: predictions that are correct, ``[client] [n] bool``.
        labels: of the same images, ``[client] [n]``.
        counts: training images, ``[client, class]``. A class without a test image does not count.
    """
    accuracies = []
    for outcomes, y, own in zip(correct, labels, counts, strict=True):
        classes = np.unique(y)
        recalls = [outcomes[y == label].mean() for label in classes]
        accuracies.append(np.average(recalls, weights=own[classes]))
    return np.array(accuracies)


def own_shares_table(results: Path, regime: str, rows: Sequence[Row]) -> str:
    """Write the benign accuracy of all methods and that under the strongest attack, with the clients' own shares.

    The last column counts the clients that answer no better under attack than always with their most frequent class.
    """
    attack = strongest_attack(rows)
    if attack is None:
        return "Not all runs of this regime have finished."
    methods = [row for row in method_rows(rows) if row.stage == "final"]
    constant = [_majority(results / run_name(methods[0].name, regime, seed)) for seed in methods[0].seeds]
    lines = [
        f"| method | seeds | benign | {attack} | clients no better than a constant answer |",
        "|---|---:|---:|---:|---:|",
        f"| always the majority class | {len(constant)} | {_cell(constant)} | {_cell(constant)} | |",
    ]
    for row in methods:
        folders = [results / run_name(row.name, regime, seed) for seed in row.seeds]
        benign, robust = ([_accuracies(folder, condition) for folder in folders] for condition in ("benign", attack))
        no_better = [
            np.sum(accuracies <= _majority(folder)) for accuracies, folder in zip(robust, folders, strict=True)
        ]
        count = f"{np.mean(no_better):.1f} of {len(robust[0])}"
        lines.append(f"| {row.name} | {len(folders)} | {_cell(benign)} | {_cell(robust)} | {count} |")
    return "\n".join(lines)


def _accuracies(folder: Path, condition: str) -> np.ndarray:
    run = RunFolder(folder)
    return weighted_accuracies(read_correct(run, condition), read_labels(run), _counts(folder))


def _majority(folder: Path) -> np.ndarray:
    """Return the accuracies of always predicting a client's most frequent class, ``[K]``."""
    pairs = zip(_counts(folder), read_labels(RunFolder(folder)), strict=True)
    tested = [own[np.unique(labels)] for own, labels in pairs]
    return np.array([own.max() / own.sum() for own in tested])


def _counts(folder: Path) -> np.ndarray:
    """Return the training images of every client and class, ``[K, num_classes]``."""
    return np.array(json.loads((folder / RESULT).read_text())["label_matrix"])


def _cell(accuracies: Sequence[np.ndarray]) -> str:
    """Write mean and worst decile of the clients, each with its spread over the seeds."""
    spreads = [(np.mean(own), np.sort(own)[: max(1, round(len(own) / 10))].mean()) for own in accuracies]
    means = [SeedMean.from_values(map(float, values)) for values in zip(*spreads, strict=True)]
    return "/".join(percent_cell(value) for value in means if value is not None)

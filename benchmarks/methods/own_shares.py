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

CLEAR = 1.64
"""Standard errors beyond which a difference is not put down to chance: 5 % on either side."""

MANY = 12
"""Training images of a client's class that is not rare."""


def weighted_accuracies(correct: Sequence[np.ndarray], labels: Sequence[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Return the accuracies of clients with the class shares of their training images, ``[K]``.

    Args:
        correct: predictions that are correct, ``[client] [n] bool``.
        labels: of the same images, ``[client] [n]``.
        counts: training images, ``[client, class]``. A class without a test image does not count, and a client without
            any that counts is left out.
    """
    accuracies = []
    for outcomes, y, own in zip(correct, labels, counts, strict=True):
        classes = np.unique(y)
        recalls = [outcomes[y == label].mean() for label in classes]
        if own[classes].any():
            accuracies.append(np.average(recalls, weights=own[classes]))
    return np.array(accuracies)


def standard_errors(correct: Sequence[np.ndarray], labels: Sequence[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Return the standard error of every client's `weighted_accuracies`, ``[K]``.

    Recalls are estimated with one more success and one more failure, so that no class is certain.
    """
    errors = []
    for outcomes, y, own in zip(correct, labels, counts, strict=True):
        classes = np.unique(y)
        n = np.array([np.sum(y == label) for label in classes])
        rates = (np.array([outcomes[y == label].sum() for label in classes]) + 1) / (n + 2)
        shares = own[classes] / own[classes].sum()
        errors.append(np.sqrt(np.sum(shares**2 * rates * (1 - rates) / n)))
    return np.array(errors)


def own_shares_table(results: Path, regime: str, rows: Sequence[Row]) -> str:
    """Write accuracies with the clients' own shares, how they compare with a constant answer, and those of many images.

    A client is clearly better or worse than always answering its most frequent class if it differs from that under
    attack by more than `CLEAR` standard errors.
    """
    attack = strongest_attack(rows)
    if attack is None:
        return "Not all runs of this regime have finished."
    methods = [row for row in method_rows(rows) if row.stage == "final"]
    constant = [constant_accuracies(results / run_name(methods[0].name, regime, seed)) for seed in methods[0].seeds]
    lines = [
        f"| method | seeds | benign | {attack} | clearly better / unclear / clearly worse than a constant answer | "
        f"benign, {MANY} images or more | {attack}, {MANY} images or more |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| always the majority class | {len(constant)} | {_cell(constant)} | {_cell(constant)} | | | |",
    ]
    for row in methods:
        folders = [results / run_name(row.name, regime, seed) for seed in row.seeds]
        cells = [_cell([own_accuracies(folder, condition) for folder in folders]) for condition in ("benign", attack)]
        cells.append(" / ".join(f"{n:.1f}" for n in np.mean([_verdicts(folder, attack) for folder in folders], axis=0)))
        cells += [_cell([_of_large_classes(folder, kind) for folder in folders]) for kind in ("benign", attack)]
        lines.append(f"| {row.name} | {len(folders)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdicts(folder: Path, attack: str) -> list[int]:
    """Return the numbers of clients that are clearly better than a constant answer, unclear, and clearly worse."""
    run = RunFolder(folder)
    errors = standard_errors(read_correct(run, attack), read_labels(run), _counts(folder))
    z = (own_accuracies(folder, attack) - constant_accuracies(folder)) / errors
    return [int(np.sum(z > CLEAR)), int(np.sum(np.abs(z) <= CLEAR)), int(np.sum(z < -CLEAR))]


def _of_large_classes(folder: Path, condition: str) -> np.ndarray:
    """Return the class-balanced accuracies over a client's classes of `MANY` training images or more, ``[K]``."""
    run = RunFolder(folder)
    return weighted_accuracies(read_correct(run, condition), read_labels(run), _counts(folder) >= MANY)


def own_accuracies(folder: Path, condition: str) -> np.ndarray:
    """Return the accuracies of the clients of a result with their own class shares, ``[K]``.

    Args:
        folder: of one result.
        condition: ``benign`` or the label of an attack.
    """
    run = RunFolder(folder)
    return weighted_accuracies(read_correct(run, condition), read_labels(run), _counts(folder))


def constant_accuracies(folder: Path) -> np.ndarray:
    """Return the accuracies of always predicting a client's most frequent class, ``[K]``."""
    pairs = zip(_counts(folder), read_labels(RunFolder(folder)), strict=True)
    tested = [own[np.unique(labels)] for own, labels in pairs]
    return np.array([own.max() / own.sum() for own in tested])


def _counts(folder: Path) -> np.ndarray:
    """Return the training images of every client and class, ``[K, num_classes]``."""
    return np.array(json.loads((folder / RESULT).read_text())["label_matrix"])


def _cell(accuracies: Sequence[np.ndarray]) -> str:
    """Write mean and worst decile of the clients, each with its spread over the seeds."""
    spreads = [(np.mean(own), np.sort(own)[: max(1, len(own) // 10)].mean()) for own in accuracies]
    means = [SeedMean.from_values(map(float, values)) for values in zip(*spreads, strict=True)]
    return "/".join(percent_cell(value) for value in means if value is not None)

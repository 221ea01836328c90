"""What a comparison says first: the best row under attack, its lead over the next one, and how certain both are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.metrics.intervals import Z_95, fleet_interval
from sylva_ray.metrics.predictions import paired_difference, read_correct, read_labels
from sylva_ray.reports.compare.rows import Row, fleets
from sylva_ray.reports.compare.verdicts import attack_title_from, method_rows, strongest_attack
from sylva_ray.storage.run_folder import RunFolder


def result_sentence(rows: Sequence[Row]) -> str:
    """Return one or two sentences with the result; empty where rows are of several fleets or share no attack.

    Args:
        rows: of a comparison.
    """
    attack, methods = strongest_attack(rows), method_rows(rows)
    if attack is None or len(fleets(methods)) > 1:
        return ""
    means = {row.letter: _robust(row, attack) for row in methods}
    finals = [row for row in methods if row.stage == "final" and not math.isnan(means[row.letter])]
    if not finals:
        return ""
    best, *others = sorted(finals, key=lambda row: -means[row.letter])
    text = f"Under {attack_title_from(rows, attack)}, row {best.letter} ({best.method}) classifies "
    text += f"{100 * means[best.letter]:.1f} %{_bounds(best, attack)} of the images of the mean client"
    text += ", which has as many of each class, correctly" if best.has_equal_shares else " correctly"
    if not others:
        return f"{text}."
    second = others[0]
    lead = f"{100 * (means[best.letter] - means[second.letter]):.1f} points more than row {second.letter} "
    text += f", {lead}({second.method})"
    found = paired_interval(best, second, attack) or unpaired_interval(best, second, attack)
    if found is None:
        return f"{text}."
    low, high = found
    text += f"; 95 % interval of the difference: {100 * low:.1f} to {100 * high:.1f} points"
    return f"{text}, so that it may be due to chance." if low <= 0 <= high else f"{text}."


def paired_interval(a: Row, b: Row, attack: str) -> tuple[float, float] | None:
    """Return the 95 % interval of the difference of two rows by a paired bootstrap over images and seeds.

    Args:
        a: of a comparison, at the end of its runs.
        b: likewise; its accuracy is subtracted.
        attack: label of an attack that both were measured under.

    Returns:
        Lower and upper bound; None where the predictions of the same images by the same seeds are not at hand.
    """
    if (a.num_honest, b.num_honest) != (a.num_clients, b.num_clients):
        return None
    folders = [dict(zip(row.seeds, row.sources, strict=False)) for row in (a, b)]
    pairs = [(folders[0][seed], folders[1][seed]) for seed in a.seeds if seed in folders[0] and seed in folders[1]]
    if not pairs or len(pairs) < max(len(a.seeds), len(b.seeds)):
        return None
    first, second = [], []
    for pair in pairs:
        one, other = (RunFolder(Path(source)) for source in pair)
        try:
            labels = read_labels(one), read_labels(other)
            correct = read_correct(one, attack), read_correct(other, attack)
        except (UserError, OSError):
            return None
        if not all(np.array_equal(x, y) for x, y in zip(*labels, strict=True)):
            return None
        first.append(correct[0])
        second.append(correct[1])
    _, low, high = paired_difference(first, second, numpy_generator(0, "comparison"))
    return low, high


def unpaired_interval(a: Row, b: Row, attack: str) -> tuple[float, float] | None:
    """Return a 95 % interval of the difference as if the rows had been measured on other images each; it is wider.

    Args:
        a: as of `paired_interval`.
        b: likewise.
        attack: likewise.

    Returns:
        Lower and upper bound; None where the numbers of images are unknown.
    """
    if not (a.images and b.images):
        return None
    difference, squared = _robust(a, attack) - _robust(b, attack), 0.0
    for row in (a, b):
        accuracy = _robust(row, attack)
        low, high = _interval(row, attack)
        squared += max(high - accuracy, accuracy - low) ** 2
    half = math.sqrt(squared)
    return difference - half, difference + half


def _robust(row: Row, attack: str) -> float:
    value = row.value(attack, "accuracy", "mean")
    return math.nan if value is None else value.mean


def _interval(row: Row, attack: str) -> tuple[float, float]:
    """Return the 95 % interval of a row's accuracy, over images and, where there are several, over seeds."""
    accuracy = _robust(row, attack)
    low, high = fleet_interval(accuracy, row.images, row.distinct)
    value = row.value(attack, "accuracy", "mean")
    of_seeds = 0.0 if value is None or value.std is None else Z_95 * value.std / math.sqrt(value.num_seeds)
    return accuracy - math.hypot(accuracy - low, of_seeds), accuracy + math.hypot(high - accuracy, of_seeds)


def _bounds(row: Row, attack: str) -> str:
    if not row.images:
        return ""
    low, high = _interval(row, attack)
    return f" ({100 * max(0.0, low):.1f} to {100 * min(1.0, high):.1f})"

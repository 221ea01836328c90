"""The points of a comparison's plots: accuracy against accuracy, and accuracy against bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.compare.rows import Row, fleets
from sylva_ray.reports.compare.verdicts import (
    attack_title_from,
    balanced_accuracies,
    dominance,
    method_rows,
    strongest_attack,
)

if TYPE_CHECKING:
    from sylva_ray.reports.figures.tradeoff import Panel, PlotPoint


MAX_LABELS = 30
"""Labels of a plot, which 64 points would take a minute to place."""


def panels(rows: Sequence[Row]) -> dict[str, list[Panel]]:
    """Return the panels of the plots ``tradeoff`` and ``bytes``; empty if no attack is common to all rows."""
    from sylva_ray.reports.figures.tradeoff import Panel

    attack = strongest_attack(rows)
    if attack is None:
        return {}
    robust_title = f"robust: {attack_title_from(rows, attack)}"
    joined = len(fleets(method_rows(rows))) == 1
    tradeoff = []
    for statistic, title in (("mean", "mean client"), ("worst_decile", "worst decile of the clients")):
        axes = ("benign accuracy, balanced", "robust accuracy, balanced")
        points = _labelled(list(_tradeoff_points(rows, attack, statistic)))
        tradeoff.append(Panel(f"{title}, {robust_title}", *axes, points, joined=joined))
    costs = []
    for index, title in enumerate(("benign", robust_title)):
        axes = ("upload per client and round", "accuracy, balanced")
        points = _labelled(list(_cost_points(rows, attack, index)))
        costs.append(Panel(f"mean client, {title}", *axes, points, in_bytes=True))
    return {"tradeoff": tradeoff, "bytes": costs} if all(panel.points for panel in [*tradeoff, *costs]) else {}


def _labelled(points: Sequence[PlotPoint]) -> tuple[PlotPoint, ...]:
    """Return the points with labels on at most `MAX_LABELS`: those on the front first, those after phase 1 last.

    The time to place labels grows with the square of their number; the page says under the pointer what a point is.
    """
    order = sorted(range(len(points)), key=lambda i: (not points[i].on_front, points[i].phase1, i))
    kept = set(order[:MAX_LABELS])
    return tuple(replace(point, labelled=index in kept) for index, point in enumerate(points))


def _tradeoff_points(rows: Sequence[Row], attack: str, statistic: str) -> Iterator[PlotPoint]:
    """Yield a point per method at its benign and robust accuracy."""
    from sylva_ray.reports.figures.tradeoff import PlotPoint

    above = dominance(rows, statistic)
    for row in rows:
        accuracies = balanced_accuracies(row, attack, statistic)
        if row.stage != "majority" and accuracies is not None:
            x, y = (_mean_and_std(value) for value in accuracies)
            on_front, is_phase1 = not above[row.name], row.stage == "phase1"
            size = 5.0 if is_phase1 else _marker_size(row, rows)
            yield PlotPoint(row.letter, row.name, *x, *y, on_front, is_phase1, size=size)


SMALLEST, LARGEST = 4.5, 11.0
"""Diameters of the markers of the rows that upload least and most, in typographic points."""


def _marker_size(row: Row, rows: Sequence[Row]) -> float:
    """Return the diameter of a row's marker: the logarithm of its upload, on the scale of all methods.

    All have the same size if the uploads are unknown or equal.
    """
    uploads = [max(other.upload_bytes.mean, 1.0) for other in method_rows(rows) if other.upload_bytes is not None]
    positive = [upload for upload in uploads if upload > 1]
    if row.upload_bytes is None or len(set(uploads)) < 2:
        return 6.0
    low, high = math.log(min(positive)) - 1, math.log(max(positive))  # no upload is a step below the smallest
    own = max(math.log(max(row.upload_bytes.mean, 1.0)), low)
    return SMALLEST + (LARGEST - SMALLEST) * (own - low) / (high - low)


def _cost_points(rows: Sequence[Row], attack: str, index: int) -> Iterator[PlotPoint]:
    """Yield a point per method at its upload and its benign (``index`` 0) or robust (1) accuracy."""
    from sylva_ray.reports.figures.tradeoff import PlotPoint

    above = dominance(rows, "mean")
    for row in rows:
        accuracies = balanced_accuracies(row, attack, "mean")
        if row.stage != "majority" and accuracies is not None and row.upload_bytes is not None:
            y = _mean_and_std(accuracies[index])
            upload = row.upload_bytes.mean
            is_phase1 = row.stage == "phase1"
            size = 5.0 if is_phase1 else 6.0
            yield PlotPoint(row.letter, row.name, upload, 0.0, *y, not above[row.name], is_phase1, size=size)


def _mean_and_std(value: SeedMean) -> tuple[float, float]:
    return value.mean, value.std or 0.0

"""Labels beside points, without overlaps: greedy over rings of candidate places, the most crowded point first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sylva_ray.reports.figures.style import LIGHT

RADII = (5.0, 9.0, 14.0, 20.0, 28.0, 38.0, 50.0, 64.0, 80.0, 100.0, 125.0)
"""Points (1/72 inch) between a point and its label."""

DIRECTIONS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
LEADER_FROM, MARKER, GAP = 7.0, 4.0, 1.5
ORDERS = 3
OVERLAP, CROSSING, ON_BAR, AMBIGUOUS = 1000.0, 40.0, 4.0, 15.0
"""Costs of covering a label or a marker, of crossing a leader line, of lying on an error bar, of lying nearer to another
point than to one's own without a leader."""


def place_labels(
    axes: Axes,
    points: np.ndarray,
    bars: np.ndarray,
    texts: Sequence[str],
    size: float,
    path: Sequence[tuple[float, float]] = (),
) -> tuple[list[tuple[float, float]], bool]:
    """Centres of the labels, in pixels of the drawn figure, and whether all of them are free of overlaps.

    Args:
        axes: laid out: what moves it later spoils the result.
        points: ``[n, 2]`` in data coordinates.
        bars: ``[n, 2]``: half lengths of the error bars, in data coordinates.
        size: of the font, in points.
        path: a line in data coordinates that labels avoid where they can.
    """
    figure = axes.figure
    scale = figure.dpi / 72
    at = axes.transData.transform(points)
    ends = [axes.transData.transform(points + sign * bars) for sign in (-1, 1)]
    extents = text_extents(axes, texts, size)
    frame = axes.get_window_extent()
    limits = np.array([frame.x0, frame.y0, frame.x1, frame.y1])
    crowd = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)) + 1e9 * np.eye(len(at))
    draw = np.random.default_rng(0)
    track = axes.transData.transform(np.array(path).reshape(-1, 2))
    best: tuple[float, list[tuple[float, float]]] = (np.inf, [])
    for attempt in range(ORDERS):
        order = np.argsort(crowd.min(1), kind="stable") if attempt == 0 else draw.permutation(len(at))
        best = min(best, _greedy(order, at, ends, track, extents, limits, scale), key=lambda found: found[0])
    return best[1], best[0] < OVERLAP


def text_extents(axes: Axes, texts: Sequence[str], size: float) -> np.ndarray:
    """``[n, 2]``: width and height of each text in pixels."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    probe = axes.text(0, 0, "", fontsize=size)
    found = []
    for text in texts:
        probe.set_text(text)
        box = probe.get_window_extent(renderer)
        found.append((box.width, box.height))
    probe.remove()
    return np.array(found)


def write_labels(
    axes: Axes, points: np.ndarray, centres: Sequence[tuple[float, float]], texts: Sequence[str], size: float
) -> None:
    """Texts at ``centres``, with a thin line to the point where a label is far from it."""
    to_data = axes.transData.inverted()
    scale = axes.figure.dpi / 72
    extents = text_extents(axes, texts, size)
    for point, centre, text, extent in zip(axes.transData.transform(points), centres, texts, extents, strict=True):
        nearest = _nearest(point, np.array(centre), extent)
        if np.hypot(*(nearest - point)) > LEADER_FROM * scale:
            line = to_data.transform([point, nearest])
            axes.plot(line[:, 0], line[:, 1], color=LIGHT["muted"], lw=0.6, zorder=1.5)
        # anchored at the side that faces the point: a reader's font may be narrower than ours
        side = np.sign(centre[0] - point[0]) if abs(centre[0] - point[0]) > extent[0] / 2 else 0
        x = centre[0] - side * extent[0] / 2
        align = {1: "left", 0: "center", -1: "right"}[int(side)]
        where = to_data.transform((x, centre[1]))
        axes.text(where[0], where[1], text, fontsize=size, ha=align, va="center", zorder=4)


def _greedy(
    order: np.ndarray,
    at: np.ndarray,
    ends: Sequence[np.ndarray],
    track: np.ndarray,
    extents: np.ndarray,
    limits: np.ndarray,
    scale: float,
) -> tuple[float, list[tuple[float, float]]]:
    """Total cost and ``[n]`` centres."""
    directions = np.stack([np.cos(DIRECTIONS), np.sin(DIRECTIONS)], 1)
    marker = MARKER * scale
    taken: list[np.ndarray] = []
    lines: list[tuple[np.ndarray, np.ndarray]] = []
    centres: list[tuple[float, float]] = [(0.0, 0.0)] * len(at)
    total = 0.0
    for index in order:
        half = extents[index] / 2 + GAP * scale
        radii = np.repeat(np.array(RADII) * scale, len(directions))
        ways = np.tile(directions, (len(RADII), 1))
        places = at[index] + ways * (radii[:, None] + half)
        boxes = np.concatenate([places - half, places + half], 1)
        cost = radii / scale / 4 - 0.8 * ways[:, 0]
        cost += OVERLAP * ((boxes[:, :2] < limits[:2]).any(1) | (boxes[:, 2:] > limits[2:]).any(1))
        markers = np.concatenate([at - marker, at + marker], 1)
        cost += OVERLAP * _overlaps(boxes, markers).sum(1)
        if taken:
            cost += OVERLAP * _overlaps(boxes, np.array(taken)).sum(1)
        for axis in (0, 1):  # error bars as thin boxes
            low, high = ends[0].copy(), ends[1].copy()
            low[:, 1 - axis] = high[:, 1 - axis] = at[:, 1 - axis]
            cost += ON_BAR * _overlaps(boxes, np.concatenate([low, high], 1)).sum(1)
        for start, end in itertools.pairwise(track):
            cost += ON_BAR * _hits(boxes, start, end)
        edges = _nearest(at[index], places, 2 * half)
        far = np.hypot(*(edges - at[index]).T) > LEADER_FROM * scale
        own = np.hypot(*(edges - at[index]).T)
        for other in np.delete(at, index, 0):
            nearer = np.hypot(*(_nearest(other, places, 2 * half) - other).T) < own + marker
            cost += AMBIGUOUS * (nearer & ~far)
        for start, end in lines:
            cost += CROSSING * (far & _crosses(at[index], edges, start, end))
            cost += CROSSING * _hits(boxes, start, end)
        for box in taken:
            cost += CROSSING * (far & _leader_hits(at[index], edges, box))
        others = np.delete(markers, index, 0)
        for box in others:
            cost += CROSSING / 4 * (far & _leader_hits(at[index], edges, box))
        choice = int(np.argmin(cost))
        total += float(cost[choice])
        taken.append(boxes[choice])
        centres[index] = (float(places[choice, 0]), float(places[choice, 1]))
        if far[choice]:
            lines.append((at[index], edges[choice]))
    return total, centres


def _nearest(point: np.ndarray, centres: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Of each box around ``centres`` the place that is nearest to the point."""
    return np.clip(point, centres - extent / 2, centres + extent / 2)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """``[m, n]``: whether box i (x0, y0, x1, y1) and box j share area."""
    a, b = boxes[:, None], others[None]
    return (a[..., 0] < b[..., 2]) & (b[..., 0] < a[..., 2]) & (a[..., 1] < b[..., 3]) & (b[..., 1] < a[..., 3])


def _crosses(start: np.ndarray, ends: np.ndarray, other_start: np.ndarray, other_end: np.ndarray) -> np.ndarray:
    """Whether the segments from ``start`` to each of ``ends [m, 2]`` cross the other segment."""

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        u, v = b - a, c - a
        return np.asarray(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])

    first = side(start, ends, other_start) * side(start, ends, other_end)
    second = side(other_start, other_end, start) * side(other_start, other_end, ends)
    return np.asarray((first < 0) & (second < 0))


def _hits(boxes: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Whether a segment passes through each box, by sampling it."""
    along = start + np.linspace(0, 1, 97)[:, None] * (end - start)
    inside = (along[None] > boxes[:, None, :2]) & (along[None] < boxes[:, None, 2:])
    return np.asarray(inside.all(2).any(1))


def _leader_hits(start: np.ndarray, ends: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Whether the segments from ``start`` to each of ``ends`` pass through one box."""
    along = start + np.linspace(0, 1, 17)[None, :, None] * (ends - start)[:, None]
    inside = (along > box[:2]) & (along < box[2:])
    return np.asarray(inside.all(2).any(1))

"""Placement of labels beside points without overlaps.

Labels are placed one after the other, the one of the most crowded point first. Each takes the cheapest of the candidate
places on rings around its point. A label that is far from its point gets a leader, a thin line to the point.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes

from sylva_ray.reports.figures.style import LIGHT

RADII = (5.0, 9.0, 14.0, 20.0, 28.0, 38.0, 50.0, 64.0, 80.0, 100.0, 125.0)
"""Distances between a point and its label, in typographic points (1/72 inch)."""

DIRECTIONS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
"""Directions from a point to its label, in radians."""

MIN_LEADER, MARKER, GAP = 7.0, 4.0, 1.5
"""In points: distance from which a label has a leader, half the side of a marker, and space around a label."""

NUM_ORDERS = 3
"""Orders of the labels that are tried: the most crowded point first, then random orders."""

OVERLAP, CROSSING, ON_BAR, AMBIGUOUS = 1000.0, 40.0, 4.0, 15.0
"""Costs of covering a label or a marker, of crossing a leader, of covering an error bar, and of being nearer to another
point than to the label's own point without a leader."""

Centre = tuple[float, float]


def place_labels(
    axes: Axes,
    points: np.ndarray,
    bars: np.ndarray,
    texts: Sequence[str],
    size: float,
    path: Sequence[Centre] = (),
) -> tuple[list[Centre], bool]:
    """Find places for the labels of points.

    Args:
        axes: the axes, with their final limits and layout.
        points: ``[n, 2]`` in data coordinates.
        bars: ``[n, 2]``, half lengths of the error bars in data coordinates.
        texts: the labels, ``[n]``.
        size: font size in typographic points.
        path: vertices of a line in data coordinates that labels avoid where possible.

    Returns:
        The centres of the labels in pixels of the figure, and whether no label overlaps anything.
    """
    layout = _Layout.from_axes(axes, points, bars, texts, size, path)
    distances = np.hypot(*(layout.points[:, None] - layout.points[None]).transpose(2, 0, 1))
    nearest = (distances + 1e9 * np.eye(len(points))).min(1)
    random = np.random.default_rng(0)
    best: tuple[float, list[Centre]] = (np.inf, [])
    for attempt in range(NUM_ORDERS):
        order = np.argsort(nearest, kind="stable") if attempt == 0 else random.permutation(len(points))
        best = min(best, _place_in_order(order, layout), key=lambda result: result[0])
    cost, centres = best
    return centres, cost < OVERLAP


def text_extents(axes: Axes, texts: Sequence[str], size: float) -> np.ndarray:
    """Return width and height of each text in pixels, ``[n, 2]``."""
    probe = axes.text(0, 0, "", fontsize=size)
    extents = []
    for text in texts:
        probe.set_text(text)
        box = probe.get_window_extent()
        extents.append((box.width, box.height))
    probe.remove()
    return np.array(extents)


def write_labels(axes: Axes, points: np.ndarray, centres: Sequence[Centre], texts: Sequence[str], size: float) -> None:
    """Write the labels, each with a leader where it is far from its point.

    Args:
        axes: the axes.
        points: ``[n, 2]`` in data coordinates.
        centres: from `place_labels`.
        texts: the labels, ``[n]``.
        size: font size in typographic points.
    """
    to_data = axes.transData.inverted()
    scale = axes.figure.dpi / 72
    extents = text_extents(axes, texts, size)
    for point, centre, text, extent in zip(axes.transData.transform(points), centres, texts, extents, strict=True):
        nearest = _nearest(point, np.array(centre), extent)
        if np.hypot(*(nearest - point)) > MIN_LEADER * scale:
            line = to_data.transform([point, nearest])
            axes.plot(line[:, 0], line[:, 1], color=LIGHT["muted"], lw=0.6, zorder=1.5)
        # the side that faces the point is anchored, because the reader's font may be narrower
        side = np.sign(centre[0] - point[0]) if abs(centre[0] - point[0]) > extent[0] / 2 else 0
        x = centre[0] - side * extent[0] / 2
        align = {1: "left", 0: "center", -1: "right"}[int(side)]
        anchor = to_data.transform((x, centre[1]))
        axes.text(anchor[0], anchor[1], text, fontsize=size, ha=align, va="center", zorder=4)


@dataclass(frozen=True)
class _Layout:
    """What the labels are placed around. Coordinates are in pixels, boxes are ``[x0, y0, x1, y1]``.

    Attributes:
        points: ``[n, 2]``.
        markers: boxes of the markers, ``[n, 4]``.
        bars: boxes of the horizontal and of the vertical error bars, two times ``[n, 4]``.
        path: vertices of the line to avoid, ``[m, 2]``.
        extents: width and height of the labels, ``[n, 2]``.
        frame: box of the axes, ``[4]``.
        scale: pixels per typographic point.
    """

    points: np.ndarray
    markers: np.ndarray
    bars: tuple[np.ndarray, ...]
    path: np.ndarray
    extents: np.ndarray
    frame: np.ndarray
    scale: float

    @classmethod
    def from_axes(
        cls,
        axes: Axes,
        points: np.ndarray,
        bars: np.ndarray,
        texts: Sequence[str],
        size: float,
        path: Sequence[Centre],
    ) -> _Layout:
        """Convert the arguments of `place_labels` to pixels."""
        scale = axes.figure.dpi / 72
        at, lows, highs = (axes.transData.transform(points + sign * bars) for sign in (0, -1, 1))
        bar_boxes = []
        for axis in (0, 1):  # an error bar is a box without extent along the other axis
            low, high = lows.copy(), highs.copy()
            low[:, 1 - axis] = high[:, 1 - axis] = at[:, 1 - axis]
            bar_boxes.append(np.concatenate([low, high], 1))
        extents = text_extents(axes, texts, size)
        frame = axes.get_window_extent()
        return cls(
            points=at,
            markers=np.concatenate([at - MARKER * scale, at + MARKER * scale], 1),
            bars=tuple(bar_boxes),
            path=axes.transData.transform(np.array(path).reshape(-1, 2)),
            extents=extents,
            frame=np.array([frame.x0, frame.y0, frame.x1, frame.y1]),
            scale=scale,
        )


@dataclass(frozen=True)
class _Candidates:
    """Candidate places of one label, in pixels.

    Attributes:
        cost: cost by distance and direction alone, ``[p]``: near and to the right is cheap.
        centres: ``[p, 2]``.
        boxes: ``[p, 4]``, with the space around the label.
        edges: the place on each box that is nearest to the point, where a leader ends, ``[p, 2]``.
        distances: between the point and ``edges``, ``[p]``.
        has_leader: whether the distance requires a leader, ``[p]``.
    """

    cost: np.ndarray
    centres: np.ndarray
    boxes: np.ndarray
    edges: np.ndarray
    distances: np.ndarray
    has_leader: np.ndarray

    @classmethod
    def from_layout(cls, layout: _Layout, index: int) -> _Candidates:
        """Return the candidates of the label ``index``."""
        point, half = layout.points[index], layout.extents[index] / 2 + GAP * layout.scale
        directions = np.stack([np.cos(DIRECTIONS), np.sin(DIRECTIONS)], 1)
        radii = np.repeat(np.array(RADII) * layout.scale, len(directions))
        ways = np.tile(directions, (len(RADII), 1))
        centres = point + ways * (radii[:, None] + half)
        edges = _nearest(point, centres, 2 * half)
        distances = _lengths(edges - point)
        return cls(
            cost=radii / layout.scale / 4 - 0.8 * ways[:, 0],
            centres=centres,
            boxes=np.concatenate([centres - half, centres + half], 1),
            edges=edges,
            distances=distances,
            has_leader=distances > MIN_LEADER * layout.scale,
        )


@dataclass(frozen=True)
class _Placed:
    """Boxes and leaders (their two ends) of the labels that have been placed."""

    boxes: list[np.ndarray] = field(default_factory=list)
    leaders: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def _place_in_order(order: np.ndarray, layout: _Layout) -> tuple[float, list[Centre]]:
    """Place the labels in the given order; return the total cost and the centres, ``[n]``."""
    placed = _Placed()
    centres: list[Centre] = [(0.0, 0.0)] * len(layout.points)
    total = 0.0
    for index in order:
        candidates = _Candidates.from_layout(layout, index)
        cost = candidates.cost.copy()
        for term in itertools.chain(
            _overlap_costs(layout, candidates, placed),
            _ambiguity_costs(layout, candidates, index),
            _leader_costs(layout, candidates, placed, index),
        ):
            cost += term
        choice = int(np.argmin(cost))
        total += float(cost[choice])
        placed.boxes.append(candidates.boxes[choice])
        if candidates.has_leader[choice]:
            placed.leaders.append((layout.points[index], candidates.edges[choice]))
        centres[index] = (float(candidates.centres[choice, 0]), float(candidates.centres[choice, 1]))
    return total, centres


def _overlap_costs(layout: _Layout, candidates: _Candidates, placed: _Placed) -> Iterator[np.ndarray]:
    """Yield the costs ``[p]`` of leaving the frame and of covering markers, labels, error bars and the path."""
    boxes = candidates.boxes
    yield OVERLAP * _leaves(boxes, layout.frame)
    yield OVERLAP * _overlaps(boxes, layout.markers).sum(1)
    if placed.boxes:
        yield OVERLAP * _overlaps(boxes, np.array(placed.boxes)).sum(1)
    for bars in layout.bars:
        yield ON_BAR * _overlaps(boxes, bars).sum(1)
    for start, end in itertools.pairwise(layout.path):
        yield ON_BAR * _passes_through(boxes, start, end)


def _ambiguity_costs(layout: _Layout, candidates: _Candidates, index: int) -> Iterator[np.ndarray]:
    """Yield the costs ``[p]`` of being near to another point, without a leader that shows the right one."""
    extent = layout.extents[index] + 2 * GAP * layout.scale
    for other in np.delete(layout.points, index, 0):
        distances = _lengths(_nearest(other, candidates.centres, extent) - other)
        nearer = distances < candidates.distances + MARKER * layout.scale
        yield AMBIGUOUS * (nearer & ~candidates.has_leader)


def _leader_costs(layout: _Layout, candidates: _Candidates, placed: _Placed, index: int) -> Iterator[np.ndarray]:
    """Yield the costs ``[p]`` of leaders that cross each other, labels or markers."""
    point = layout.points[index]
    for start, end in placed.leaders:
        yield CROSSING * (candidates.has_leader & _crosses(point, candidates.edges, start, end))
        yield CROSSING * _passes_through(candidates.boxes, start, end)
    for box in placed.boxes:
        yield CROSSING * (candidates.has_leader & _leads_through(point, candidates.edges, box))
    for box in np.delete(layout.markers, index, 0):
        yield CROSSING / 4 * (candidates.has_leader & _leads_through(point, candidates.edges, box))


# -- geometry ----------------------------------------------------------------------------------------------------------


def _nearest(point: np.ndarray, centres: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Return the place in each box around ``centres`` that is nearest to the point."""
    return np.asarray(np.clip(point, centres - extent / 2, centres + extent / 2))


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """Return the lengths ``[m]`` of ``vectors [m, 2]``."""
    return np.asarray(np.hypot(vectors[:, 0], vectors[:, 1]))


def _leaves(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Return whether each of ``boxes [m, 4]`` is partly outside the frame, ``[m]``."""
    return np.asarray((boxes[:, :2] < frame[:2]).any(1) | (boxes[:, 2:] > frame[2:]).any(1))


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return whether box i of ``boxes [m, 4]`` and box j of ``others [n, 4]`` share area, ``[m, n]``."""
    a, b = boxes[:, None], others[None]
    return (a[..., 0] < b[..., 2]) & (b[..., 0] < a[..., 2]) & (a[..., 1] < b[..., 3]) & (b[..., 1] < a[..., 3])


def _crosses(start: np.ndarray, ends: np.ndarray, other_start: np.ndarray, other_end: np.ndarray) -> np.ndarray:
    """Return whether the segments from ``start`` to each of ``ends [m, 2]`` cross the other segment, ``[m]``."""

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        u, v = b - a, c - a
        return np.asarray(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])

    separates_other = side(start, ends, other_start) * side(start, ends, other_end) < 0
    is_separated = side(other_start, other_end, start) * side(other_start, other_end, ends) < 0
    return np.asarray(separates_other & is_separated)


def _passes_through(boxes: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return whether a segment passes through each of ``boxes [m, 4]``, ``[m]``; the segment is sampled."""
    along = start + np.linspace(0, 1, 97)[:, None] * (end - start)
    inside = (along[None] > boxes[:, None, :2]) & (along[None] < boxes[:, None, 2:])
    return np.asarray(inside.all(2).any(1))


def _leads_through(start: np.ndarray, ends: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return whether the segments from ``start`` to each of ``ends [m, 2]`` pass through one box, ``[m]``."""
    along = start + np.linspace(0, 1, 17)[None, :, None] * (ends - start)[:, None]
    inside = (along > box[:2]) & (along < box[2:])
    return np.asarray(inside.all(2).any(1))

"""Scatter plots of accuracies against each other or a cost, with the Pareto front, for comparisons and sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sylva_ray.reports.figures.labels import place_labels, write_labels
from sylva_ray.reports.figures.style import LIGHT, add_hint, add_legend, is_narrow, new_figure, style
from sylva_ray.reports.pages.wording import bytes_text

LABEL_SIZE = 8.0
"""Font size of labels, in typographic points."""

MAX_NAME = 34
"""Number of characters of a name in a plot; a longer name is cut."""


@dataclass(frozen=True)
class PlotPoint:
    """A point of the plot. Accuracies are fractions in [0, 1].

    Attributes:
        mark: label where names would overlap, e.g. the row in the table beside the plot.
        name: label otherwise.
        x: accuracy or cost on the horizontal axis.
        x_std: standard deviation of ``x`` over seeds; 0 if there is none.
        y: accuracy on the vertical axis.
        y_std: standard deviation of ``y`` over seeds; 0 if there is none.
        on_front: whether no other point dominates it; such a point is filled.
        phase1: whether it shows runs after phase 1; such a point is a diamond.
        labelled: whether it has a label.
        size: diameter of its marker, in typographic points.
    """

    mark: str
    name: str
    x: float
    x_std: float
    y: float
    y_std: float
    on_front: bool
    phase1: bool = False
    labelled: bool = True
    size: float = 6.0


@dataclass(frozen=True)
class Panel:
    """A pair of axes of the plot.

    Attributes:
        title: title above the axes.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        points: the points, at least one.
        in_bytes: whether x is a size in bytes, shown on a logarithmic axis with an additional tick for 0; otherwise x
            is a fraction.
        joined: whether a line joins the points on the front.
    """

    title: str
    x_label: str
    y_label: str
    points: tuple[PlotPoint, ...]
    in_bytes: bool = False
    joined: bool = False


def draw_tradeoff(panels: Sequence[Panel]) -> Figure:
    """Draw panels below each other.

    Points are labelled by name or, if names would overlap, by mark with a key below the axes.
    """
    with style():
        for by_name in (True, False):
            figure = _draw(panels, by_name)
            if figure is not None:
                return figure
        figure = _draw(panels, by_name=False, overlapping=True)
        assert figure is not None
        return figure


def _draw(panels: Sequence[Panel], by_name: bool, overlapping: bool = False) -> Figure | None:
    """Draw the panels; return None if labels overlap, unless ``overlapping`` allows it."""
    labelled = [[point for point in panel.points if point.labelled] for panel in panels]
    key = {} if by_name else {point.mark: point.name for points in labelled for point in points}
    key_columns = 1 if is_narrow() else 2 if key and max(map(len, key.values())) > 26 else 3
    key_lines = math.ceil(len(key) / key_columns)
    crowded = max(map(len, labelled)) > 10
    axes_height, key_height = 4.3 if crowded else 3.0, 0.17 * key_lines + 0.15 * bool(key)
    height = 0.35 + axes_height * len(panels) + key_height
    engine = ConstrainedLayoutEngine(rect=(0, key_height / height, 1, 1 - key_height / height))
    figure = new_figure(height)
    figure.set_layout_engine(engine)
    plots = list(figure.subplots(len(panels), 1, squeeze=False)[:, 0])
    for axes, panel in zip(plots, panels, strict=True):
        _draw_points(axes, panel)
    _legend(figure, panels)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the labels are placed in this layout
    for axes, panel, points in zip(plots, panels, labelled, strict=True):
        if not points:
            continue
        texts = [_short(point.name) if by_name else point.mark for point in points]
        at = np.array([(_x(panel, point), point.y) for point in points])
        bars = np.array([(point.x_std, point.y_std) for point in points])
        centres, no_overlap = place_labels(axes, at, bars, texts, LABEL_SIZE, _front(panel))
        if not no_overlap and not overlapping:
            return None
        limits = axes.get_xlim(), axes.get_ylim()
        write_labels(axes, at, centres, texts, LABEL_SIZE)
        axes.set(xlim=limits[0], ylim=limits[1])
    for position, (mark, name) in enumerate(key.items()):
        column, line = divmod(position, key_lines)
        anchor = 0.02 + 0.97 * column / key_columns, (key_height - 0.17 * (line + 1)) / height
        figure.text(*anchor, f"{mark}  {_short(name)}", fontsize=LABEL_SIZE, va="bottom")
    return figure


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _x(panel: Panel, point: PlotPoint) -> float:
    """Return the position of a point on the horizontal axis."""
    return point.x if point.x > 0 or not panel.in_bytes else _x_of_zero(panel)


def _x_of_zero(panel: Panel) -> float:
    """Return the position of 0 bytes on the logarithmic axis."""
    positive = [point.x for point in panel.points if point.x > 0]
    return min(positive) / 4 if positive else 1.0


def _front(panel: Panel) -> list[tuple[float, float]]:
    """Return the vertices of the line that joins the points on the front; empty if they are not joined."""
    return sorted((point.x, point.y) for point in panel.points if point.on_front) if panel.joined else []


def _draw_points(axes: Axes, panel: Panel) -> None:
    for point in panel.points:
        face = LIGHT["series-1"] if point.on_front else LIGHT["surface"]
        x = _x(panel, point)
        if point.x_std or point.y_std:
            axes.errorbar(
                x,
                point.y,
                xerr=point.x_std or None,
                yerr=point.y_std or None,
                fmt="none",
                ecolor=LIGHT["series-1"],
                elinewidth=0.9,
                alpha=0.55,
                zorder=2,
            )
        marker = "D" if point.phase1 else "o"
        axes.plot(x, point.y, marker, ms=point.size, mfc=face, mec=LIGHT["series-1"], mew=1.3, zorder=3)
        add_hint(axes, x, point.y, _hint(panel, point))
    front = _front(panel)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=LIGHT["series-1"], lw=1, alpha=0.35, zorder=1)
    title = fill(panel.title, 44) if is_narrow() else panel.title
    axes.set(title=title, xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(color=LIGHT["grid"])
    axes.tick_params(length=0)
    axes.yaxis.set_major_formatter(_PERCENT)
    low = min(point.y - point.y_std for point in panel.points)
    high = max(point.y + point.y_std for point in panel.points)
    axes.set_ylim(*_padded(low, high))
    if panel.in_bytes:
        _byte_axis(axes, panel)
    else:
        axes.xaxis.set_major_formatter(_PERCENT)
        low = min(point.x - point.x_std for point in panel.points)
        high = max(point.x + point.x_std for point in panel.points)
        axes.set_xlim(*_padded(low, high))


def _hint(panel: Panel, point: PlotPoint) -> str:
    """Return what a point is and its numbers, for the pointer."""
    across = bytes_text(point.x) if panel.in_bytes else _with_std(point.x, point.x_std)
    return f"{point.name}: {panel.x_label} {across}, {panel.y_label} {_with_std(point.y, point.y_std)}"


def _with_std(value: float, std: float) -> str:
    return f"{100 * value:.1f}{f' ± {100 * std:.1f}' if std else ''} %"


_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if value > -1e-9 else "")


def _padded(low: float, high: float) -> tuple[float, float]:
    """Return limits that leave room for labels around the points.

    An axis covers at least four percentage points, so that its ticks differ, and does not extend far below 0.
    """
    room = max(0.16 * (high - low), 0.02)
    return max(low - room, min(low, 0.0) - 0.03), high + room


def _byte_axis(axes: Axes, panel: Panel) -> None:
    """Set ticks at 1, 2 and 5 times powers of ten, and "none" at 0 bytes."""
    axes.set_xscale("log")
    positions = [_x(panel, point) for point in panel.points]
    low, high = min(positions), max(positions)
    room = max((high / low) ** 0.25, 3.0)
    axes.set_xlim(low / room, high * room)
    positive = [point.x for point in panel.points if point.x > 0]
    ticks: list[float] = []
    if positive:
        first, last = min(positive) / (1.6 if low < min(positive) else room), high * room
        decades = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
        steps = (1, 2, 5) if last / first < 1e4 else (1,)
        ticks = [m * 10.0**d for d in decades for m in steps if first <= m * 10.0**d <= last]
    zero = [_x_of_zero(panel)] if any(point.x <= 0 for point in panel.points) else []
    axes.xaxis.set_major_locator(FixedLocator([*zero, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "none" if x in zero else bytes_text(x)))


def _legend(figure: Figure, panels: Sequence[Panel]) -> None:
    marker = partial(Line2D, [], [], color=LIGHT["series-1"], ls="", mew=1.3, ms=6)
    shown = [point for panel in panels for point in panel.points]
    handles = [
        marker(marker="o", label="not dominated"),
        marker(marker="o", mfc=LIGHT["surface"], label="dominated"),
    ]
    if any(point.phase1 for point in shown):
        handles.append(marker(marker="D", mfc=LIGHT["surface"], label="after phase 1", ms=5))
    if any(point.x_std or point.y_std for point in shown):
        handles.append(Line2D([], [], color=LIGHT["series-1"], lw=0.9, alpha=0.55, label="± std over seeds"))
    if len({point.size for point in shown if not point.phase1}) > 1:
        handles.append(marker(marker="o", mfc=LIGHT["surface"], label="larger: uploads more", ms=9))
    add_legend(figure, handles, 2 if is_narrow() else 3)

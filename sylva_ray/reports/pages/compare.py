"""``sylva-ray compare --out FILE.html``: the page and the plots of many runs beside each other.

What they say is made in `sylva_ray.reports.compare`; here it is laid out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sylva_ray.reports.figures.labels import place_labels, write_labels
from sylva_ray.reports.figures.plots import WIDTH
from sylva_ray.reports.figures.style import DARK, LIGHT, style, svg
from sylva_ray.reports.pages.run import page_environment
from sylva_ray.reports.pages.wording import bytes_text

LABEL_SIZE = 8.0
MAX_NAME = 34
"""Characters of a name in a plot."""

DESCRIPTIONS = {
    "tradeoff": "Benign against robust accuracy of every method",
    "bytes": "Benign and robust accuracy of every method against its upload",
}


@dataclass(frozen=True)
class Point:
    """A row in a plot. ``number`` is its place in the table; ``x_std``, ``y_std`` are 0 where there is no spread."""

    number: int
    name: str
    x: float
    x_std: float
    y: float
    y_std: float
    on_front: bool
    phase1: bool


@dataclass(frozen=True)
class Panel:
    """One pair of axes. ``in_bytes``: x is a size on a logarithmic axis (0 has a place of its own), else a fraction.
    ``joined``: the points on the front are joined by a line."""

    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    in_bytes: bool = False
    joined: bool = False


@dataclass(frozen=True)
class Cell:
    """Text, a second line in small print, the marks of failed checks."""

    text: str
    small: str = ""
    marks: str = ""


@dataclass(frozen=True)
class TableColumn:
    """Columns of one group stand side by side under its name."""

    group: str
    heading: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Page:
    """What the page says, as plain text. ``names``, ``muted`` (a reference) and ``warned`` have an entry per row."""

    subtitle: str
    attack: str
    names: tuple[str, ...]
    muted: tuple[bool, ...]
    warned: tuple[bool, ...]
    columns: tuple[TableColumn, ...]
    warnings: tuple[str, ...]
    sentences: tuple[str, ...]
    footnotes: tuple[str, ...]
    notes: tuple[str, ...]
    panels: Mapping[str, Sequence[Panel]]


def render(page: Page) -> str:
    """The HTML file: self-contained, light and dark."""
    groups: list[tuple[str, int]] = []
    for column in page.columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = column.group, groups[-1][1] + 1
        else:
            groups.append((column.group, 1))
    figures = {name: Markup(svg(draw(panels), name, DESCRIPTIONS[name])) for name, panels in page.panels.items()}
    template = page_environment().get_template("compare.html.jinja")
    return template.render(page=page, groups=groups, figures=figures, light=LIGHT, dark=DARK)


def draw(panels: Sequence[Panel]) -> Figure:
    """The panels below each other. Points are labelled by name; by number, with a key, where names would overlap."""
    with style():
        for by_name in (True, False):
            figure = _draw(panels, by_name)
            if figure is not None:
                return figure
        figure = _draw(panels, by_name=False, overlapping=True)
        assert figure is not None
        return figure


def _draw(panels: Sequence[Panel], by_name: bool, overlapping: bool = False) -> Figure | None:
    """None if labels overlap, unless ``overlapping``."""
    key = {} if by_name else {point.number: point.name for panel in panels for point in panel.points}
    key_columns = 2 if key and max(map(len, key.values())) > 26 else 3
    key_lines = math.ceil(len(key) / key_columns)
    crowded = max(len(panel.points) for panel in panels) > 10
    axes_height, key_height = 4.3 if crowded else 3.0, 0.17 * key_lines + 0.15 * bool(key)
    height = 0.35 + axes_height * len(panels) + key_height
    engine = ConstrainedLayoutEngine(rect=(0, key_height / height, 1, 1 - key_height / height))
    figure = Figure(figsize=(WIDTH, height), layout=engine)
    plots = list(figure.subplots(len(panels), 1, squeeze=False)[:, 0])
    for axes, panel in zip(plots, panels, strict=True):
        _points(axes, panel)
    _legend(figure, panels)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured from here on must not move
    for axes, panel in zip(plots, panels, strict=True):
        texts = [_short(point.name) if by_name else str(point.number) for point in panel.points]
        at = np.array([(_x(panel, point), point.y) for point in panel.points])
        bars = np.array([(point.x_std, point.y_std) for point in panel.points])
        centres, clean = place_labels(axes, at, bars, texts, LABEL_SIZE, _front(panel))
        if not clean and not overlapping:
            return None
        limits = axes.get_xlim(), axes.get_ylim()
        write_labels(axes, at, centres, texts, LABEL_SIZE)
        axes.set(xlim=limits[0], ylim=limits[1])
    for place, (number, name) in enumerate(sorted(key.items())):
        column, line = divmod(place, key_lines)
        where = 0.02 + 0.97 * column / key_columns, (key_height - 0.17 * (line + 1)) / height
        figure.text(*where, f"{number}  {_short(name)}", fontsize=LABEL_SIZE, va="bottom")
    return figure


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _x(panel: Panel, point: Point) -> float:
    return point.x if point.x > 0 or not panel.in_bytes else _nothing(panel)


def _nothing(panel: Panel) -> float:
    """Where an upload of 0 bytes stands on the logarithmic axis."""
    known = [point.x for point in panel.points if point.x > 0]
    return min(known) / 4 if known else 1.0


def _front(panel: Panel) -> list[tuple[float, float]]:
    """The line that joins the points on the front."""
    return sorted((point.x, point.y) for point in panel.points if point.on_front) if panel.joined else []


def _points(axes: Axes, panel: Panel) -> None:
    for point in panel.points:
        face = LIGHT["series-1"] if point.on_front else LIGHT["surface"]
        x = _x(panel, point)
        bars: dict[str, Any] = {"xerr": point.x_std or None, "yerr": point.y_std or None}
        if any(bars.values()):
            axes.errorbar(
                x, point.y, **bars, fmt="none", ecolor=LIGHT["series-1"], elinewidth=0.9, alpha=0.55, zorder=2
            )
        marker = "D" if point.phase1 else "o"
        axes.plot(x, point.y, marker, ms=5 if point.phase1 else 6, mfc=face, mec=LIGHT["series-1"], mew=1.3, zorder=3)
    front = _front(panel)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=LIGHT["series-1"], lw=1, alpha=0.35, zorder=1)
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
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


_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f}%" if value > -1e-9 else "")


def _padded(low: float, high: float) -> tuple[float, float]:
    """Room for labels around the points; at least four points of percentage, so that the ticks stay apart. There is
    nothing below 0."""
    room = max(0.16 * (high - low), 0.02)
    return max(low - room, min(low, 0.0) - 0.03), high + room


def _byte_axis(axes: Axes, panel: Panel) -> None:
    """Sizes at 1, 2, 5 times powers of ten; "none" where nothing is sent."""
    axes.set_xscale("log")
    places = [_x(panel, point) for point in panel.points]
    low, high = min(places), max(places)
    room = max((high / low) ** 0.25, 3.0)
    axes.set_xlim(low / room, high * room)
    known = [point.x for point in panel.points if point.x > 0]
    ticks: list[float] = []
    if known:
        first, last = min(known) / (1.6 if min(places) < min(known) else room), high * room
        decades = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
        steps = (1, 2, 5) if last / first < 1e4 else (1,)
        ticks = [m * 10.0**d for d in decades for m in steps if first <= m * 10.0**d <= last]
    nothing = [_nothing(panel)] if any(point.x <= 0 for point in panel.points) else []
    axes.xaxis.set_major_locator(FixedLocator([*nothing, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "none" if x in nothing else bytes_text(x)))


def _legend(figure: Figure, panels: Sequence[Panel]) -> None:
    line: dict[str, Any] = {"color": LIGHT["series-1"], "ls": "", "mew": 1.3, "ms": 6}
    shown = [point for panel in panels for point in panel.points]
    handles = [
        Line2D([], [], marker="o", label="not dominated", **line),
        Line2D([], [], marker="o", mfc=LIGHT["surface"], label="dominated", **line),
    ]
    if any(point.phase1 for point in shown):
        handles.append(Line2D([], [], marker="D", mfc=LIGHT["surface"], label="after phase 1", **line | {"ms": 5}))
    if any(point.x_std or point.y_std for point in shown):
        handles.append(Line2D([], [], color=LIGHT["series-1"], lw=0.9, alpha=0.55, label="± std over seeds"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4, borderpad=0.3)

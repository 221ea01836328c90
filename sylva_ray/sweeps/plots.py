"""The figures of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from sylva_ray.reports.compare.rows import short_key
from sylva_ray.reports.figures.style import LIGHT, add_hint, add_legend, is_narrow, new_figure, style
from sylva_ray.reports.figures.tradeoff import Panel, PlotPoint, draw_tradeoff
from sylva_ray.sweeps.metrics import ACCURACIES, COSTS
from sylva_ray.sweeps.points import number_of, value_text
from sylva_ray.sweeps.results import Point, Sweep, front_of
from sylva_ray.sweeps.space import Objective, Parameter

DESCRIPTIONS = {
    "parallel": "Parallel coordinates: one line per point through its parameters and accuracies",
    "pareto": "Benign against robust accuracy of every point, with the Pareto front",
    "effects": "Benign and robust accuracy against each parameter",
    "timeline": "Which trial ran when",
}
"""Descriptions of the figures, for screen readers."""

BENIGN, ROBUST = ACCURACIES[:2]
MAX_PANELS, MAX_BARS, MAX_LABELS = 6, 400, 12


def figures(sweep: Sweep) -> dict[str, Figure]:
    """Draw all figures that the results allow, by name, in the report's order."""
    points = [point for point in sweep.points if point.complete]
    with style():
        drawn = {}
        if len(points) > 1:
            drawn["pareto"] = _tradeoff(points)
            drawn["effects"] = _effects(sweep, points)
            drawn["parallel"] = _parallel(sweep, points)
        if any(trial.spans for trial in sweep.trials):
            drawn["timeline"] = _timeline(sweep)
        return {name: figure for name, figure in drawn.items() if figure is not None}


def _tradeoff(points: Sequence[Point]) -> Figure | None:
    """Draw benign against robust accuracy; the first points on the front, in the order of the table, have a label."""
    measured = [point for point in points if {BENIGN, ROBUST} <= point.metrics.keys()]
    if not measured:
        return None
    front = [point.name for point in front_of(measured, (Objective(metric=BENIGN), Objective(metric=ROBUST)))]
    drawn = []
    for number, point in enumerate(measured, 1):
        x, y = point.metrics[BENIGN], point.metrics[ROBUST]
        on_front, is_labelled = point.name in front, point.name in front[:MAX_LABELS]
        drawn.append(
            PlotPoint(
                str(number), point.label, x.mean, x.std or 0.0, y.mean, y.std or 0.0, on_front, labelled=is_labelled
            )
        )
    return draw_tradeoff([Panel("", "benign accuracy", "robust accuracy", tuple(drawn), joined=True)])


def _effects(sweep: Sweep, points: Sequence[Point]) -> Figure:
    """Draw, per parameter, every point faintly and the mean of the points that share a value."""
    keys = list(sweep.space.parameters)[:MAX_PANELS]
    columns = min(1 if is_narrow() else 3, len(keys))
    rows = -(-len(keys) // columns)
    figure = new_figure(0.5 + 2.5 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, key in zip(panels, keys, strict=False):
        _effect(axes, key, sweep.space.parameters[key], points)
    for axes in panels[::columns]:
        axes.set_ylabel("accuracy")
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    handles = [
        Line2D([], [], color=LIGHT[f"series-{i}"], marker="o", ms=5, label=name)
        for i, name in enumerate(("benign", "robust"), 1)
    ]
    handles.append(
        Line2D([], [], color=LIGHT["muted"], marker="o", ms=3, ls="", alpha=0.6, label="one point of the sweep")
    )
    add_legend(figure, handles, 3)
    return figure


def _effect(axes: Axes, key: str, parameter: Parameter, points: Sequence[Point]) -> None:
    places, ticks = _scale(key, parameter, [point.values[key] for point in points])
    for index, metric in enumerate((BENIGN, ROBUST), 1):
        colour = LIGHT[f"series-{index}"]
        known = [
            (x, point.metrics[metric].mean) for x, point in zip(places, points, strict=True) if metric in point.metrics
        ]
        if not known:
            continue
        x, y = np.array(known).T
        axes.plot(x, y, "o", ms=3, color=colour, alpha=0.4)
        for point, place in zip(points, places, strict=True):
            if metric in point.metrics:
                mean = point.metrics[metric].mean
                add_hint(axes, place, mean, f"{point.label}: {metric.replace('_', ' ')} {100 * mean:.1f} %")
        if ticks is not None:
            levels = np.unique(x)
            axes.plot(levels, [y[x == level].mean() for level in levels], "o-", ms=5, lw=1.6, color=colour)
    if ticks is not None:
        crowded = max(len(text) for text in ticks.values()) > 8
        axes.set_xticks(
            list(ticks), list(ticks.values()), rotation=25 if crowded else 0, ha="right" if crowded else "center"
        )
    if parameter.kind == "loguniform":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: value_text(key, float(place))))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=key, ylim=(-0.02, 1.02))
    axes.margins(x=0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y")
    axes.tick_params(length=0)


def _scale(key: str, parameter: Parameter, values: Sequence[Any]) -> tuple[list[float], dict[float, str] | None]:
    """Return places on an axis and labels of the places; no labels for a range of real numbers or too many places."""
    numbers = [number_of(value) for value in values]
    if None in numbers:
        texts = list(dict.fromkeys(value_text(key, value) for value in values))
        return [float(texts.index(value_text(key, value))) for value in values], {
            float(i): t for i, t in enumerate(texts)
        }
    known = [float(number) for number in numbers if number is not None]
    if parameter.kind in ("uniform", "loguniform") or len(set(known)) > 8:
        return known, None
    return known, dict(sorted((number, value_text(key, value)) for number, value in zip(known, values, strict=True)))


def _parallel(sweep: Sweep, points: Sequence[Point]) -> Figure:
    """Draw one line per point, the chosen ones in colour. Every axis runs over its own range."""
    metrics = list(dict.fromkeys([BENIGN, ROBUST, *(o.metric for o in sweep.space.objectives)]))
    metrics = [metric for metric in metrics if all(metric in point.metrics for point in points)]
    names = [short_key(key) for key in sweep.space.parameters] + [
        m.replace("_", "\n", 1).replace("_", " ") for m in metrics
    ]
    columns: list[list[float]] = []
    labels: list[Mapping[float, str]] = []
    for key in sweep.space.parameters:
        places, ticks = _scale(key, sweep.space.parameters[key], [point.values[key] for point in points])
        ordered = sorted(set(places))
        if ticks is not None:  # listed values stand at equal distances
            columns.append([ordered.index(place) / max(1, len(ordered) - 1) for place in places])
            labels.append({ordered.index(place) / max(1, len(ordered) - 1): text for place, text in ticks.items()})
        else:
            columns.append(_stretched(places))
            labels.append({0.0: value_text(key, ordered[0]), 1.0: value_text(key, ordered[-1])})
    for metric in metrics:
        values = [point.metrics[metric].mean for point in points]
        columns.append(_stretched(values))
        texts = [f"{v:,.0f}" if metric in COSTS else f"{100 * v:.1f}%" for v in (min(values), max(values))]
        labels.append({0.0: texts[0], 1.0: texts[1]})
    figure = new_figure(3.4)
    axes = figure.subplots()
    lines = np.array(columns).T
    order = sorted(range(len(points)), key=lambda index: points[index].chosen)
    for index in order:
        chosen = points[index].chosen
        colour = LIGHT["series-2"] if chosen else LIGHT["series-1"]
        axes.plot(
            lines[index], color=colour, lw=2.2 if chosen else 1, alpha=1 if chosen else 0.4, zorder=3 if chosen else 2
        )
    for place, marks in enumerate(labels):
        axes.axvline(place, color=LIGHT["grid"], lw=1, zorder=1)
        for height, text in marks.items():
            axes.annotate(
                text,
                (place, height),
                (4, 0),
                textcoords="offset points",
                fontsize=7.5,
                va="center",
                zorder=4,
                bbox={"facecolor": LIGHT["surface"], "edgecolor": "none", "alpha": 0.9, "pad": 0.8},
            )
    axes.set_xticks(range(len(names)), names)
    axes.set(yticks=[], xlim=(-0.15, len(names) - 0.6), ylim=(-0.06, 1.06))
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    word = "not dominated" if len(sweep.space.objectives) > 1 else "the best"
    handles = [Line2D([], [], color=LIGHT["series-2"], label=word)]
    if not all(point.chosen for point in points):
        handles.append(Line2D([], [], color=LIGHT["series-1"], lw=1, label="others"))
    add_legend(figure, handles, 2)
    return figure


def _stretched(values: Sequence[float]) -> list[float]:
    """Stretch values to [0, 1]; equal values to the middle."""
    low, high = min(values), max(values)
    return [0.5 if high == low else (value - low) / (high - low) for value in values]


def _timeline(sweep: Sweep) -> Figure:
    """Draw one bar per attempt, trials in the order in which they began."""
    trials = sorted((trial for trial in sweep.trials if trial.spans), key=lambda trial: trial.spans[0][0])[:MAX_BARS]
    start = trials[0].spans[0][0]
    colours = {
        "finished": LIGHT["series-1"],
        "pruned": LIGHT["muted"],
        "failed": LIGHT["series-2"],
        "refused": LIGHT["series-2"],
    }
    figure = new_figure(0.8 + min(4.5, 0.16 * len(trials)))
    axes = figure.subplots()
    for row, trial in enumerate(trials):
        for began, ended in trial.spans:
            axes.barh(row, max(ended - began, 0.1), left=began - start, height=0.7, color=colours[trial.state])
    axes.set(ylim=(len(trials) - 0.4, -0.6), xlabel="seconds since the first trial began", ylabel="trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x")
    axes.tick_params(length=0)
    seen = [state for state in colours if any(trial.state == state for trial in trials)]
    handles = [Patch(color=colours[state], label=state) for state in seen]
    add_legend(figure, handles, 3)
    return figure

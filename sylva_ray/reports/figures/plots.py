"""Figures of a run, for the report (as SVG) and for MLflow (as PNG).

Heatmaps encode magnitude by the opacity of one hue, or of two for signed values, so that zero is the colour of the
page, light or dark. The module does not use pyplot, whose state is global.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sylva_ray.core.records import GameRecord, StageRecord
from sylva_ray.core.summary import Communication, RunSeconds, Spread, StageAccuracies, Summary
from sylva_ray.federation.stages.kinds import is_exchange, phase_of, phase_title, title_of
from sylva_ray.federation.stages.layer_game.rankings.registry import RANKINGS
from sylva_ray.metrics.checks import UNBOUNDED
from sylva_ray.reports.figures.style import LIGHT, accuracy_axis, add_hint, add_legend, is_narrow, new_figure, style
from sylva_ray.reports.pages.wording import SECONDS, bytes_text

MAX_CLASS_NAME = 18
"""Characters of the name of a class beside an axis."""

MAX_LABELLED_CLIENTS, MAX_HINTED_CLIENTS, MAX_DOTTED_CLIENTS, MAX_SINGLE_CLIENTS = 24, 60, 150, 500
"""Greatest number of clients with a label each, with a hint under the pointer, with a dot per selected layer, and with
a mark or a column each."""


def figures(summary: Summary | None, records: Sequence[StageRecord], titles: Mapping[str, str]) -> dict[str, Figure]:
    """Draw the figures of a run that its files allow.

    Args:
        summary: summary of the run; None while it has not finished.
        records: records of its stages, oldest first.
        titles: titles of the attacks, by label; an attack without one is shown by its label.

    Returns:
        The figures by name, in the order of the report.
    """
    with style():
        drawn: dict[str, Figure] = {}
        if summary is not None:
            drawn["fleet"] = _fleet(summary)
        if any(record.evaluation for record in records):
            drawn["accuracy"] = _accuracy(records, summary, titles)
        if summary is not None:
            if summary.initial is not None:
                drawn["clients"] = _clients(summary, summary.initial, titles)
            game = summary.layer_game
            if game and (game.shapley or game.scores):
                attackers = summary.byzantine.attackers if summary.byzantine else []
                drawn["layers"] = _layers(game, attackers)
            drawn["communication"] = _communication(summary.communication, records)
            drawn["seconds"] = _seconds(summary.seconds)
        return drawn


def robust_conditions(records: Sequence[StageRecord]) -> list[str]:
    """Return the labels of the evaluation's attacks, without the one that only a check needs."""
    conditions = dict.fromkeys(condition for record in records for condition in record.evaluation or ())
    return [condition for condition in conditions if condition not in ("benign", UNBOUNDED.label)]


def class_label(name: object) -> str:
    """Return the name of a class, cut to `MAX_CLASS_NAME` characters."""
    text = str(name)
    return text if len(text) <= MAX_CLASS_NAME else f"{text[: MAX_CLASS_NAME - 1]}…"


# -- figures -----------------------------------------------------------------------------------------------------------


def _fleet(summary: Summary) -> Figure:
    """Draw the number of training images per class (rows) and client (columns) as a heatmap."""
    counts = np.asarray(summary.label_matrix).T
    num_classes, num_clients = counts.shape
    figure = new_figure(1.1 + 0.24 * min(num_classes, 18))
    axes, bar = figure.subplots(1, 2, width_ratios=[40, 1])
    shown = _joined(counts)
    _heatmap(axes, shown / max(1, shown.max()), num_clients)
    if num_clients * num_classes <= 240 and num_clients <= (12 if is_narrow() else MAX_LABELLED_CLIENTS):
        for (row, column), count in np.ndenumerate(counts):
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7.5)
    if num_classes <= 20:
        axes.set_yticks(range(num_classes), [class_label(name) for name in summary.class_names])
    axes.set_ylabel("class")
    _client_axis(axes, num_clients)
    _scale(bar, 0, round(shown.max()), "training images")
    return figure


def _accuracy(records: Sequence[StageRecord], summary: Summary | None, titles: Mapping[str, str]) -> Figure:
    """Draw mean accuracy over steps, with a band for the middle 80 % of the clients, and below it the loss."""
    losses = [(record.step, np.mean(loss)) for record in records if (loss := record.counted_metric("loss"))]
    figure = new_figure(4.6 if losses else 3.4)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 2]) if losses else (figure.subplots(), None)
    evaluated = [(record, record.evaluation) for record in records if record.evaluation]
    names, handles = _step_names(records), list[Any]()
    for index, condition in enumerate(["benign", *robust_conditions(records)]):
        colour = LIGHT[f"series-{index % 6 + 1}"]
        measured = [(record, of_record[condition]) for record, of_record in evaluated if condition in of_record]
        points = [(record.step, record.counted(found.accuracy)) for record, found in measured]
        points = [(step, values) for step, values in points if values]
        in_part = {record.step for record, _ in measured if record.in_part}
        if not points:  # of Byzantine clients only
            continue
        steps = [step for step, _ in points]
        low, high = np.array([np.percentile(values, [10, 90]) for _, values in points]).T
        axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
        label = titles.get(condition, condition)
        means = [np.mean(values) for _, values in points]
        handles += axes.plot(steps, means, "o-", color=colour, ms=4, label=label)
        hollow = [(step, mean) for step, mean in zip(steps, means, strict=True) if step in in_part]
        for step, mean in hollow:
            axes.plot([step], [mean], "o", color=colour, markerfacecolor=LIGHT["surface"], ms=4)
        for step, mean, least, most in zip(steps, means, low, high, strict=True):
            name = names.get(step, f"step {step}")
            spread = f"middle 80 % of the clients {100 * least:.1f} to {100 * most:.1f} %"
            spread += "; measured in part" if step in in_part else ""
            add_hint(axes, step, float(mean), f"{label}, {name}: {100 * mean:.1f} %; {spread}")
    if summary is not None:
        majority = summary.majority.mean
        handles.append(
            axes.axhline(majority, color=LIGHT["muted"], lw=1.2, ls=(0, (4, 3)), label="always the majority class")
        )
    later = [record for record in records if phase_of(record.stage) > 1]
    if later:
        axes.axvspan(later[0].step - 0.5, later[-1].step + 0.5, color=LIGHT["grid"], alpha=0.55, lw=0, zorder=0)
        handles.append(Patch(color=LIGHT["grid"], alpha=0.55, lw=0, label=phase_title([r.stage for r in later])))
    axes.set(ylim=(0, 1), xlim=(-0.5, max(record.step for record in records) + 0.5))
    accuracy_axis(axes)
    if below is not None:
        below.plot(*zip(*losses, strict=True), "o-", color=LIGHT["muted"], ms=3, lw=1.4)
        for step, mean in losses:
            if np.isfinite(mean):
                add_hint(below, step, float(mean), f"training loss, {names.get(step, f'step {step}')}: {mean:.3f}")
        top = max((loss for _, loss in losses if np.isfinite(loss)), default=1.0)
        below.set(ylabel="training loss", ylim=(0, 1.1 * top or 1.0))
        below.grid(axis="y")
        below.tick_params(length=0)
    _step_axis(below or axes, records)
    add_legend(figure, handles, 3)
    return figure


def _step_names(records: Sequence[StageRecord]) -> dict[int, str]:
    """Return the title of every step's stage, and of a round of phase 1 its number."""
    rounds = [record.step for record in records if is_exchange(record.stage)]
    titles = {record.step: title_of(record.stage) for record in records}
    return titles | {step: f"round {number}" for number, step in enumerate(rounds, 1)}


def _step_axis(axes: Axes, records: Sequence[StageRecord]) -> None:
    """Name the steps by their stages: rounds of phase 1 by their number, all others by their title."""
    rounds = [record for record in records if is_exchange(record.stage)]
    others = [record for record in records if not is_exchange(record.stage)]
    every = max(1, -(-len(rounds) // (6 if is_narrow() else 12)))
    shown = {record.step: str(number) for number, record in [*enumerate(rounds, 1)][every - 1 :: every]}
    if len(records) <= (14 if is_narrow() else 30):
        shown |= {record.step: title_of(record.stage) for record in others}
        axes.set_xlabel("stage; a number is a round of phase 1")
    else:  # names of neighbours would overlap
        axes.set_xlabel("round of phase 1")
    axes.set_xticks(list(shown), list(shown.values()))
    for label in axes.get_xticklabels():
        if not label.get_text().isdigit():
            label.set(rotation=35, ha="right", rotation_mode="anchor")


def _clients(summary: Summary, before: StageAccuracies, titles: Mapping[str, str]) -> Figure:
    """Draw the accuracies of the clients before and after the defence.

    Up to `MAX_SINGLE_CLIENTS` each has a vertical line that joins both; more are shown as sorted curves.
    """
    after = summary.final
    panels = [("benign", before.benign_accuracy, after.benign_accuracy, LIGHT["series-1"])]
    for label in list(after.robust_accuracy)[:1]:
        robust = before.robust_accuracy[label], after.robust_accuracy[label]
        panels.append((titles.get(label, label), *robust, LIGHT["series-2"]))
    figure = new_figure(0.5 + 2.1 * len(panels))
    majority = np.array(summary.majority.per_client)
    num_clients = len(majority)
    if num_clients > MAX_SINGLE_CLIENTS:
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _sorted_curves(axes, *panel, majority)
        add_legend(figure, figure.axes[0].get_lines(), 3)
        return figure
    size = 6 if num_clients <= MAX_LABELLED_CLIENTS else max(1.5, 6 - num_clients / 40)
    for axes, (title, start, end, colour) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
    ):
        accuracy_before, accuracy_after = np.array(start.per_client), np.array(end.per_client)
        order = (
            np.arange(num_clients) if num_clients <= MAX_LABELLED_CLIENTS else np.argsort(accuracy_after, kind="stable")
        )
        x = np.arange(num_clients)
        axes.vlines(x, accuracy_before[order], accuracy_after[order], color=LIGHT["muted"], lw=size / 4, alpha=0.6)
        axes.plot(x, majority[order], "_", color=LIGHT["muted"], ms=size * 1.8, mew=size / 4)
        axes.plot(x, accuracy_before[order], "o", ms=size, mfc=LIGHT["surface"], mec=colour, mew=size / 5)
        axes.plot(x, accuracy_after[order], "o", ms=size, color=colour)
        for place, client in enumerate(order[:MAX_HINTED_CLIENTS]):
            change = f"{100 * accuracy_before[client]:.1f} % before, {100 * accuracy_after[client]:.1f} % after"
            add_hint(axes, place, accuracy_after[client], f"client {client}: {change}")
        axes.set(title=title, ylim=(-0.03, 1.03), xlim=(-0.6, num_clients - 0.4))
        accuracy_axis(axes)
        if num_clients <= MAX_LABELLED_CLIENTS:
            _client_axis(axes, num_clients)
        else:
            axes.set(xticks=[], xlabel=f"{num_clients} clients, sorted by accuracy")
    grey = LIGHT["muted"]
    handles = [
        Line2D([], [], color=grey, ls="", marker="o", ms=6, mfc=LIGHT["surface"], label="before the defence"),
        Line2D([], [], color=grey, ls="", marker="o", ms=6, label="after it"),
        Line2D([], [], color=grey, ls="", marker="_", ms=10, mew=1.5, label="always the majority class"),
    ]
    add_legend(figure, handles, 3)
    return figure


def _sorted_curves(axes: Axes, title: str, start: Spread, end: Spread, colour: str, majority: np.ndarray) -> None:
    """Draw the accuracies of a large fleet before and after the defence, each sorted."""
    shares = np.linspace(0, 1, 201)
    muted = LIGHT["muted"]
    axes.plot(shares, np.quantile(start.per_client, shares), "--", color=colour, lw=1.8, label="before the defence")
    axes.plot(shares, np.quantile(end.per_client, shares), color=colour, lw=1.8, label="after it")
    axes.plot(shares, np.quantile(majority, shares), ":", color=muted, lw=1.8, label="always the majority class")
    axes.set(title=title, ylim=(0, 1), xlim=(0, 1), xlabel="clients, the worst first; each curve is sorted")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    accuracy_axis(axes)


def _layers(game: GameRecord, attackers: Sequence[int]) -> Figure:
    """Draw the scores of layers (rows, input first) and clients (columns) as a heatmap, with dots at selected layers.

    Bars on the right show which fraction of the honest clients selected a layer.
    """
    values, selected = np.array(game.shapley or game.scores, float).T, np.array(game.selected, bool).T
    num_layers, num_clients = values.shape
    sizes = np.abs(np.nan_to_num(values))
    top = float(np.percentile(sizes, 98)) or 1.0  # without clipping, a few outliers would fade all others
    figure = new_figure(1.2 + 0.25 * num_layers)
    axes, fraction, bar = figure.subplots(1, 3, width_ratios=[30, 12 if is_narrow() else 7, 1])
    _heatmap(axes, _joined(np.clip(values / top, -1, 1)), num_clients)
    if num_clients <= MAX_DOTTED_CLIENTS:
        rows, columns = np.nonzero(selected)
        axes.plot(columns, rows, "o", ms=5 if num_clients <= 40 else 2, color=LIGHT["ink"])
    axes.set_yticks(range(num_layers), [name.replace("blocks.", "block ") for name in game.players])
    _client_axis(axes, num_clients)
    honest = np.delete(selected, list(attackers), axis=1)
    fraction.barh(range(num_layers), honest.mean(1), color=LIGHT["muted"], height=0.55)
    fraction.set(title="selected by", xlim=(0, 1), ylim=(num_layers - 0.5, -0.5), yticks=[])
    fraction.set_xticks([0, 1] if is_narrow() else [0, 0.5, 1])
    fraction.xaxis.set_major_formatter(PercentFormatter(1))
    _scale(bar, -top, top, RANKINGS[game.selection].axis, clipped=bool(sizes.max() > top))
    return figure


def _communication(communication: Communication, records: Sequence[StageRecord]) -> Figure:
    """Draw the bytes of this run and those of full-model training in the same rounds."""
    full = communication.full_model_bytes
    sent = [len(r.participants) - len(r.missing) - len(r.dropped) for r in records if is_exchange(r.stage)]
    panels = [
        ("one client uploads in one round", communication.upload_bytes_per_client_round, full),
        ("the whole run, all clients, up and down", communication.total_bytes, 2 * full * sum(sent)),
    ]
    figure = new_figure(2.4 if is_narrow() else 1.35)
    shape = (2, 1) if is_narrow() else (1, 2)
    for axes, (title, this_run, full_model) in zip(figure.subplots(*shape, sharey=True), panels, strict=True):
        ratio = f"  ({full_model / this_run:,.0f}x)" if this_run and full_model else ""
        texts = [bytes_text(this_run), bytes_text(full_model) + ratio]
        _bars(axes, ["this run", "full model"], [this_run, full_model], texts, [LIGHT["series-1"], LIGHT["muted"]])
        axes.set_title(title)
    return figure


def _seconds(seconds: RunSeconds) -> Figure:
    """Draw the seconds per kind of work that the run had, summed over the workers."""
    by_work = {title: value for key, title in SECONDS.items() if (value := getattr(seconds, key)) > 0}
    total = sum(by_work.values())
    figure = new_figure(0.4 + 0.26 * len(by_work))
    texts = [f"{value:,.1f} s  ({value / total:.0%})" for value in by_work.values()]
    colours = [LIGHT["muted"] if title == SECONDS["idle"] else LIGHT["series-1"] for title in by_work]
    _bars(figure.subplots(), list(by_work), list(by_work.values()), texts, colours)
    return figure


# -- parts of figures --------------------------------------------------------------------------------------------------


def _joined(values: np.ndarray) -> np.ndarray:
    """Return ``values [rows, clients]`` with at most `MAX_SINGLE_CLIENTS` columns: means over consecutive clients.

    Clients without a number do not count; a column of none but them has none.
    """
    starts = np.linspace(0, values.shape[1], min(values.shape[1], MAX_SINGLE_CLIENTS), endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, values.shape[1]))
    known = ~np.isnan(values)
    counts = np.add.reduceat(known.astype(int), starts, axis=1) if not known.all() else sizes
    sums = np.add.reduceat(np.where(known, values, 0), starts, axis=1)
    means: np.ndarray = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means


def _heatmap(axes: Axes, values: np.ndarray, num_clients: int | None = None) -> None:
    """Draw ``values [rows, columns]`` in [-1, 1]: blue above zero, orange below, opacity by magnitude; NaN is grey.

    Args:
        axes: to draw on.
        values: of the cells.
        num_clients: that the columns stand for; None: one each.
    """
    image = np.empty((*values.shape, 4))
    image[..., :3] = np.where(values[..., None] >= 0, to_rgb(LIGHT["series-1"]), to_rgb(LIGHT["series-2"]))
    image[..., 3] = 0.85 * np.abs(np.nan_to_num(values))
    image[np.isnan(values)] = to_rgba(LIGHT["grid"])
    edges = (-0.5, (num_clients or values.shape[1]) - 0.5, values.shape[0] - 0.5, -0.5)
    axes.imshow(image, aspect="auto", interpolation="none", extent=edges)  # a pixel per cell, which the browser scales
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _scale(axes: Axes, low: float, high: float, label: str, clipped: bool = False) -> None:
    """Draw the colour bar of a heatmap; ``clipped`` marks the ends, whose shade also stands for the values beyond."""
    steps = np.linspace(high, low, 64)[:, None]
    _heatmap(axes, steps / max(abs(low), abs(high), 1e-12))
    ticks = [low, high] if low == 0 else [low, 0, high]
    texts = [f"{tick:.2g}" if isinstance(high, float) else f"{tick:,}" for tick in ticks]
    if clipped:
        texts[0], texts[-1] = f"≤ {texts[0]}", f"≥ {texts[-1]}"
    axes.set_xticks([])
    axes.set_yticks([63 * (high - tick) / max(high - low, 1e-12) for tick in ticks], texts)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(label)


def _client_axis(axes: Axes, num_clients: int) -> None:
    if num_clients <= MAX_LABELLED_CLIENTS:
        axes.set_xticks(range(0, num_clients, 2 if is_narrow() and num_clients > 12 else 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4 if is_narrow() else 10))
    axes.set_xlabel("client")


def _bars(axes: Axes, names: list[str], values: list[float], texts: list[str], colours: list[str]) -> None:
    """Draw horizontal bars from zero, each followed by its text."""
    axes.barh(range(len(names)), values, color=colours, height=0.6)
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.annotate(text, (value, row), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.45 * max([*values, 1e-12])), xticks=[])
    axes.tick_params(length=0, labelcolor=LIGHT["ink"])
    axes.spines[["left", "bottom"]].set_visible(False)

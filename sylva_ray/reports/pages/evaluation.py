"""The section of a report about ``evaluation.json``: attacks, curves, classes, transfer, certificates, images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, PercentFormatter
from PIL import Image

from sylva_ray.attacks.base import budget_words
from sylva_ray.attacks.registry import attack_title
from sylva_ray.core.evaluation import AttackRow, CertifiedLevel, ConditionRow, Curve, Evaluation, PerClass
from sylva_ray.core.text import of_255
from sylva_ray.core.types import AttackSpec
from sylva_ray.reports.figures.plots import class_label
from sylva_ray.reports.figures.style import LIGHT, accuracy_axis, add_legend, new_figure, style

SHOWN_SIDE = 96
"""Least side of an image in the gallery, in pixels."""

EVALUATION_DESCRIPTIONS = {
    "epsilon": "Accuracy against the attack's budget",
    "steps": "Accuracy against the attack's steps",
    "classes": "Accuracy of every class, benign and attacked",
    "transfer": "Heatmap of accuracy of every client on images made against every other client",
    "certified": "Certified accuracy against radius",
}
"""Alternative texts of the figures, for screen readers."""


@dataclass(frozen=True)
class TableRow:
    """A row of the table of attacks. Accuracies are fractions in [0, 1].

    Attributes:
        name: title of the condition.
        mean: accuracy, mean over the clients.
        low: lower end of the 95 % interval over images.
        high: its upper end.
        worst: accuracy, mean over the worst tenth of the clients.
        balanced: class-balanced accuracy, mean over the clients.
        distance: median size of the smallest successful perturbation, with its unit; empty if it was not measured.
    """

    name: str
    mean: float
    low: float
    high: float
    worst: float
    balanced: float
    distance: str


@dataclass(frozen=True)
class GalleryFigure:
    """An adversarial image and the original; images are PNG data URIs.

    Attributes:
        client: number of the client whose test image it is.
        label: name of the true class.
        answer: name of the class that the client predicts.
        size: L-infinity distance, as text.
        amplified: factor by which ``delta`` is amplified, as text.
        clean: the original.
        delta: the perturbation, on grey.
        adversarial: their sum.
    """

    client: int
    label: str
    answer: str
    size: str
    amplified: str
    clean: str
    delta: str
    adversarial: str


def attack_rows(evaluation: Evaluation) -> list[TableRow]:
    """Return the rows of the table of attacks: benign, each attack, and the worst case of each budget."""
    specs = {label: row.settings.to_spec() for label, row in evaluation.attacks.items()}
    conditions: dict[str, ConditionRow] = {"benign": evaluation.benign}
    conditions |= {attack_title(specs[label]): row for label, row in evaluation.attacks.items()}
    conditions |= {
        f"worst case per image, {_budget(specs[row.attacks[0]])}": row for row in evaluation.worst_case.values()
    }
    return [
        TableRow(
            name=name,
            mean=row.accuracy.mean,
            low=row.interval[0],
            high=row.interval[1],
            worst=row.accuracy.worst_decile,
            balanced=row.balanced_accuracy.mean,
            distance=_distance(row) if isinstance(row, AttackRow) else "",
        )
        for name, row in conditions.items()
    ]


def evaluation_figures(evaluation: Evaluation, class_names: Sequence[str]) -> dict[str, Figure]:
    """Draw the figures of an evaluation, by name; a figure is missing where its quantity was not measured.

    Args:
        evaluation: the evaluation.
        class_names: names of the classes.
    """
    with style():
        drawn: dict[str, Figure] = {}
        if evaluation.curves is not None:
            majority, by_epsilon = evaluation.majority.mean, evaluation.curves.epsilon
            by_steps = evaluation.curves.steps
            in_255 = [255 * x for x in by_epsilon.x]
            drawn["epsilon"] = _curve(by_epsilon, in_255, "epsilon (of 255)", [0, 1, 4, 16, 64], majority)
            drawn["steps"] = _curve(by_steps, by_steps.x, "PGD steps", [1, 5, 20, 50, 200], majority)
        drawn["classes"] = _classes(evaluation.per_class, class_names)
        if evaluation.transfer is not None:
            drawn["transfer"] = _transfer(evaluation.transfer.matrix)
        if evaluation.certified:
            drawn["certified"] = _certified(evaluation.certified)
        return drawn


def gallery(evaluation: Evaluation) -> list[GalleryFigure]:
    """Encode the images of an evaluation's gallery: original, perturbation and adversarial image."""
    images = []
    for item in evaluation.gallery:
        clean = np.array(item.clean, float).transpose(1, 2, 0)
        adversarial = np.array(item.adversarial, float).transpose(1, 2, 0)
        delta = adversarial - clean
        largest = max(np.abs(delta).max(), 1e-6)
        images.append(
            GalleryFigure(
                client=item.client,
                label=item.label,
                answer=item.answer,
                size=of_255(item.distance, 2),
                amplified=f"{127 / largest:.0f}",
                clean=_png(clean),
                delta=_png(127.5 + 127.5 * delta / largest),
                adversarial=_png(adversarial),
            )
        )
    return images


def _budget(spec: AttackSpec) -> str:
    text = budget_words(spec)
    return {"linf": f"L-infinity epsilon {text}", "l2": f"L2 epsilon {text}", "l0": f"{text} pixels"}[spec.norm]


def _distance(row: AttackRow) -> str:
    value = row.median_distance
    if value is None:
        return ""
    texts = {"linf": of_255(value, 2), "l2": f"{value:.2g}", "l0": f"{value:.0f} pixels"}
    return texts[row.settings.norm]


def _curve(curve: Curve, x: Sequence[float], label: str, ticks: Sequence[float], majority: float) -> Figure:
    figure = new_figure(2.9)
    axes = figure.subplots()
    for accuracies in curve.per_client:
        axes.plot(x, accuracies, color=LIGHT["series-2"], lw=0.8, alpha=0.35)
    axes.plot(x, curve.mean, "o-", color=LIGHT["series-2"], ms=4, label="mean over clients")
    axes.axhline(majority, color=LIGHT["muted"], lw=1.2, ls=(0, (4, 3)), label="always the majority class")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlim=(min(x) - 0.1, 1.1 * max(x)), ylim=(0, 1), xlabel=label)
    accuracy_axis(axes)
    add_legend(figure, columns=2)
    return figure


def _classes(per_class: PerClass, names: Sequence[str]) -> Figure:
    seen = [c for c, count in enumerate(per_class.images) if count]
    figure = new_figure(1.0 + 0.26 * len(seen))
    axes = figure.subplots()
    bars = (
        (-0.18, per_class.benign, "benign", LIGHT["series-1"]),
        (0.18, per_class.worst_case, "worst case over attacks", LIGHT["series-2"]),
    )
    for offset, recall, text, colour in bars:
        widths = [value for c in seen if (value := recall[c]) is not None]
        axes.barh(np.arange(len(seen)) + offset, widths, height=0.34, color=colour, label=text)
    axes.set_yticks(range(len(seen)), [f"{class_label(names[c])} ({per_class.images[c]})" for c in seen])
    axes.set(xlim=(0, 1), ylim=(len(seen) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x")
    axes.tick_params(length=0)
    add_legend(figure, columns=2)
    return figure


def _transfer(matrix: Sequence[Sequence[float | None]]) -> Figure:
    values = np.array([[np.nan if v is None else v for v in row] for row in matrix])
    figure = new_figure(min(7.0, 1.4 + 0.34 * len(values)))
    axes = figure.subplots()
    image = np.empty((*values.shape, 4))
    image[..., :3] = [int(LIGHT["series-1"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    image[..., 3] = 0.85 * np.nan_to_num(values)
    image[np.isnan(values)] = to_rgba(LIGHT["grid"])  # not measured, which is not 0 %
    axes.imshow(image, aspect="auto", interpolation="none")
    if len(values) <= 20:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5)
        axes.set_xticks(range(len(values)))
        axes.set_yticks(range(len(values)))
    axes.set(xlabel="attacked client", ylabel="surrogate client")
    axes.tick_params(length=0)
    return figure


def _certified(levels: Sequence[CertifiedLevel]) -> Figure:
    figure = new_figure(2.7)
    axes = figure.subplots()
    for index, level in enumerate(levels):
        colour = LIGHT[f"series-{index % 6 + 1}"]
        # between two radii that were asked for, what the larger one certifies is known, not what the smaller one does
        axes.step(level.radii, level.mean, where="pre", color=colour, label=f"sigma {level.sigma:g}")
    axes.set(ylim=(0, 1), xlim=(0, None), xlabel="L2 radius (pixel units, whole image)")
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    accuracy_axis(axes)
    add_legend(figure, columns=4)
    return figure


def _png(pixels: np.ndarray) -> str:
    """Encode ``pixels [H, W, 3]`` in 0..255 as a PNG data URI, enlarged without smoothing."""
    image = Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
    scale = max(1, SHOWN_SIDE // image.width)
    buffer = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

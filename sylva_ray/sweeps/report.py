"""``report.html`` of a sweep: one self-contained page. Words and rows are made here, `sweep.html.jinja` lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, FileSystemLoader
from markupsafe import Markup

from sylva_ray.attacks.registry import attack_title
from sylva_ray.core.credentials import mask_credentials
from sylva_ray.reports.compare.rows import short_key
from sylva_ray.reports.figures.style import DARK, LIGHT, svg
from sylva_ray.reports.pages.run import page_environment
from sylva_ray.sweeps.plots import DESCRIPTIONS, figures
from sylva_ray.sweeps.points import corners, value_text
from sylva_ray.sweeps.results import Sweep, shown_metrics, value_cell


def render(sweep: Sweep) -> str:
    """The HTML file."""
    environment = page_environment()
    environment.loader = ChoiceLoader([FileSystemLoader(Path(__file__).parent), environment.loader])  # type: ignore[list-item]
    drawn = {name: Markup(svg(figure, f"sweep-{name}", DESCRIPTIONS[name])) for name, figure in figures(sweep).items()}
    return environment.get_template("sweep.html.jinja").render(_view(sweep) | {"figures": drawn})


def _view(sweep: Sweep) -> dict[str, Any]:
    space = sweep.space
    metrics = shown_metrics(space)
    config = space.config(next(iter(corners(space))), space.seeds[0])
    attacks = config.evaluation.specs
    return {
        "light": LIGHT,
        "dark": DARK,
        "title": space.name,
        "subtitle": f"{len(sweep.points)} points, {len(sweep.trials)} trials, {_search(sweep)}",
        "several": len(space.objectives) > 1,
        "goals": [f"{'highest' if o.mode == 'max' else 'lowest'} {_words(o.metric)}" for o in space.objectives],
        "attack": attack_title(attacks[0]) if attacks else "",
        "keys": [short_key(key) for key in space.parameters],
        "metrics": [_words(metric) for metric in metrics],
        "rows": [_row(sweep, point.name, metrics) for point in sweep.points],
        "chosen": [
            {"label": point.label, "cells": [(m, value_cell(m, point.metrics.get(m))) for m in metrics]}
            for point in sweep.chosen
        ],
        "counts": sweep.counts,
        "failed": [(trial.key, trial.state, mask_credentials(trial.error)) for trial in sweep.failed],
        "checks": sorted({check for point in sweep.points for check in point.checks}),
        "busy": sweep.busy_share,
        "workers": sweep.workers,
        "seconds": sweep.seconds,
        "seeds": len(space.seeds),
        "on_test": config.dataset.test_pool == "test",
        "sizes_differ": any(key.startswith(("partition.", "dataset.", "evaluation.")) for key in space.parameters),
        "space": mask_credentials(space.to_yaml()),
    }


def _row(sweep: Sweep, name: str, metrics: list[str]) -> Mapping[str, Any]:
    point = next(point for point in sweep.points if point.name == name)
    return {
        "name": point.name,
        "chosen": point.chosen,
        "state": "" if point.complete else ", ".join(sorted(set(point.states))),
        "checks": ", ".join(point.checks),
        "values": [value_text(point.values[key]) for key in sweep.space.parameters],
        "cells": [value_cell(metric, point.metrics.get(metric)) for metric in metrics],
        "seeds": f"{point.states.count('finished')} of {len(sweep.space.seeds)}",
    }


def _search(sweep: Sweep) -> str:
    kind = {"grid": "all of a grid", "random": "drawn at random", "optuna": "suggested by Optuna"}[
        sweep.space.search.kind
    ]
    return kind if sweep.space.scheduler.kind == "fifo" else f"{kind}, pruned by ASHA"


def _words(metric: str) -> str:
    """``robust_accuracy.worst_decile`` -> ``robust accuracy, worst decile``."""
    return metric.replace(".", ", ").replace("_", " ")

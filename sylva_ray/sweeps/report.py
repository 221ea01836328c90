"""The report of a sweep, a self-contained HTML page. Words and rows are made here, `sweep.html.jinja` lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import ChoiceLoader, FileSystemLoader

from sylva_ray.attacks.registry import attack_title
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.credentials import mask_credentials, mask_yaml
from sylva_ray.core.errors import UserError
from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.compare.rows import short_key
from sylva_ray.reports.figures.style import DARK, LIGHT
from sylva_ray.reports.pages.run import figure_elements, page_environment
from sylva_ray.storage.run_folder import TRIALS
from sylva_ray.sweeps.metrics import COSTS
from sylva_ray.sweeps.plots import DESCRIPTIONS, figures
from sylva_ray.sweeps.points import value_text
from sylva_ray.sweeps.results import Point, Sweep, shown_metrics, value_cell


@dataclass(frozen=True)
class PointRow:
    """A row of the table of points.

    Attributes:
        name: name of the point.
        label: its values, in one text.
        chosen: whether it is the best or on the front.
        state: states of its trials if it is incomplete, else empty.
        checks: names of failed checks, else empty.
        values: one cell per swept key.
        cells: one cell per metric.
        seeds: how many seeds are done.
        reports: seeds that are done, each with the path of its trial's report, relative to the page.
    """

    name: str
    label: str
    chosen: bool
    state: str
    checks: str
    values: Sequence[str]
    cells: Sequence[str]
    seeds: str
    reports: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class FailedTrial:
    """A trial that failed or was refused, with the reason."""

    key: str
    state: str
    error: str


@dataclass(frozen=True)
class SweepPage:
    """What the page says, as plain text.

    Attributes:
        title: name of the space.
        subtitle: how many points and trials, and how they were found.
        several: whether there are several objectives.
        goals: one text per objective.
        attacks: titles of the attacks that robust accuracy is under: one, unless points differ in it; or none.
        keys: headings of the swept keys.
        metrics: headings of the metrics.
        rows: all points, best first.
        counts: number of trials per state.
        failed: trials that failed or were refused.
        checks: names of all checks that failed.
        busy: fraction of the workers' time spent computing.
        workers: most workers at once.
        seconds: seconds in which trials ran.
        num_seeds: seeds per point.
        on_test: whether points are measured on the test images.
        sizes_differ: whether points differ in their clients or in what they are measured with.
        space: the space as YAML.
    """

    title: str
    subtitle: str
    several: bool
    goals: Sequence[str]
    attacks: Sequence[str]
    keys: Sequence[str]
    metrics: Sequence[str]
    rows: Sequence[PointRow]
    counts: Mapping[str, int]
    failed: Sequence[FailedTrial]
    checks: Sequence[str]
    busy: float
    workers: int
    seconds: float
    num_seeds: int
    on_test: bool
    sizes_differ: bool
    space: str

    @property
    def chosen(self) -> list[PointRow]:
        """The best point, or the front."""
        return [row for row in self.rows if row.chosen]


def render(sweep: Sweep) -> str:
    """Return the HTML page."""
    environment = page_environment()
    assert environment.loader is not None
    environment.loader = ChoiceLoader([FileSystemLoader(Path(__file__).parent), environment.loader])
    drawn = figure_elements([partial(figures, sweep)], DESCRIPTIONS, "sweep-")
    template = environment.get_template("sweep.html.jinja")
    return template.render(page=_page(sweep), figures=drawn, light=LIGHT, dark=DARK)


def _page(sweep: Sweep) -> SweepPage:
    space = sweep.space
    configs = _experiments(sweep)
    firsts = [config.evaluation.specs[0] for config in configs if config.evaluation.attacks]
    return SweepPage(
        title=space.name,
        subtitle=f"{len(sweep.points)} points, {len(sweep.trials)} trials, {_search(sweep)}",
        several=len(space.objectives) > 1,
        goals=[f"{'highest' if o.mode == 'max' else 'lowest'} {_words(o.metric)}" for o in space.objectives],
        attacks=list(dict.fromkeys(map(attack_title, firsts))),
        keys=[short_key(key) for key in space.parameters],
        metrics=[_words(metric) for metric in shown_metrics(space)],
        rows=[_row(sweep, point) for point in sweep.points],
        counts=sweep.counts,
        failed=[FailedTrial(trial.key, trial.state, mask_credentials(trial.error)) for trial in sweep.failed],
        checks=sorted({check for point in sweep.points for check in point.checks}),
        busy=sweep.busy_share,
        workers=sweep.workers,
        seconds=sweep.seconds,
        num_seeds=len(space.seeds),
        on_test=any(config.dataset.test_pool == "test" for config in configs),
        sizes_differ=any(key.split(".")[0] in ("partition", "dataset", "evaluation") for key in space.parameters),
        space=mask_yaml(space.to_yaml()),
    )


def _experiments(sweep: Sweep) -> list[ExperimentConfig]:
    """Return the experiment of every point that makes one; Optuna may have tried others."""
    configs = []
    for point in sweep.points:
        with suppress(UserError):
            configs.append(sweep.space.config(point.values, sweep.space.seeds[0]))
    return configs


def _row(sweep: Sweep, point: Point) -> PointRow:
    return PointRow(
        name=point.name,
        label=point.label,
        chosen=point.chosen,
        state="" if point.complete else ", ".join(sorted(set(point.states))),
        checks=", ".join(point.checks),
        values=[value_text(key, point.values[key]) for key in sweep.space.parameters],
        cells=[_cell(metric, point.metrics.get(metric)) for metric in shown_metrics(sweep.space)],
        seeds=sweep.seeds_done(point),
        reports=[
            (trial.seed, f"{TRIALS}/{trial.key}/report.html")
            for trial in sweep.trials
            if trial.point == point.name and trial.state == "finished"
        ],
    )


def _cell(metric: str, value: SeedMean | None) -> str:
    """Return a value with its unit, in one piece."""
    unit = "" if value is None or metric in COSTS else " %"
    return f"{value_cell(metric, value)}{unit}".replace(" ", "\N{NO-BREAK SPACE}")


def _search(sweep: Sweep) -> str:
    kinds = {"grid": "all of a grid", "random": "drawn at random", "optuna": "suggested by Optuna"}
    kind = kinds[sweep.space.search.kind]
    return kind if sweep.space.scheduler.kind == "fifo" else f"{kind}, pruned by ASHA"


def _words(metric: str) -> str:
    """Return a metric's name in words.

    >>> _words("robust_accuracy.worst_decile")
    'robust accuracy, worst decile'
    """
    return metric.replace(".", ", ").replace("_", " ")

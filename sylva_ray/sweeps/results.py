"""The results of a sweep, from its trials' run folders: a row per point, over its seeds; the best or the Pareto front.

Only a point whose seeds have all finished can be chosen: a trial with fewer rounds than the others is not comparable.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from sylva_ray.core.errors import UserError
from sylva_ray.core.text import as_argument
from sylva_ray.federation.stages.kinds import is_exchange
from sylva_ray.metrics.pareto import dominators
from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.pages.wording import bytes_text
from sylva_ray.sweeps.events import AttemptEvent
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.metrics import ACCURACIES, COSTS, busy_seconds, step_metrics
from sylva_ray.sweeps.points import PointValues, Trial, point_label
from sylva_ray.sweeps.space import Objective, Space

STATES = ("finished", "pruned", "failed", "refused")
"""States of a trial."""


@dataclass(frozen=True)
class TrialResult:
    """One experiment.

    Attributes:
        key: name of the trial and of its run folder.
        point: name of its point.
        values: values of the parameters.
        seed: seed of the experiment.
        state: ``finished``, ``pruned`` (by the scheduler), ``failed`` or ``refused`` (``error`` says why).
        metrics: after its last step, see `sylva_ray.sweeps.metrics`.
        history: ``[(step, metrics)]`` after every step.
        rounds: rounds of phase 1 that it did.
        spans: ``[(began, ended)]`` in Unix seconds, one per attempt.
        workers: workers that computed for it.
        busy: seconds that they spent computing, summed over the workers.
        checks: names of the checks that failed.
        error: why it failed or was refused; else empty.
    """

    key: str
    point: str
    values: PointValues
    seed: int
    state: str
    metrics: Mapping[str, float]
    history: Sequence[tuple[int, Mapping[str, float]]]
    rounds: int
    spans: Sequence[tuple[float, float]]
    workers: int
    busy: float
    checks: Sequence[str] = ()
    error: str = ""


@dataclass(frozen=True)
class Point:
    """One choice of the parameters.

    Attributes:
        name: hash of the values, the same in every sweep.
        label: the values, for people.
        values: values of the parameters.
        seeds: seeds of its trials.
        states: states of its trials, in the order of the seeds.
        metrics: over the seeds that finished.
        complete: whether all seeds of the space finished.
        chosen: whether it is the best point or, with several objectives, on the Pareto front.
        checks: names of the checks that failed in one of its trials.
    """

    name: str
    label: str
    values: PointValues
    seeds: Sequence[int]
    states: Sequence[str]
    metrics: Mapping[str, SeedMean]
    complete: bool
    chosen: bool
    checks: Sequence[str]


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep.

    Attributes:
        space: what was searched.
        trials: all of them; those of a grid or a random search in the order of `planned_trials`.
        points: best first by the first objective, incomplete ones last.
        folder: the sweep's folder.
    """

    space: Space
    trials: Sequence[TrialResult]
    points: Sequence[Point]
    folder: Path

    @classmethod
    def from_trials(cls, space: Space, trials: Sequence[TrialResult], folder: Path) -> Sweep:
        """Group the trials into points and mark those that are chosen."""
        return cls(space, trials, _points(space, trials), folder)

    @property
    def chosen(self) -> list[Point]:
        """The best point or, with several objectives, the points that no other one dominates."""
        return [point for point in self.points if point.chosen]

    @property
    def failed(self) -> list[TrialResult]:
        """Trials that failed in every attempt, or whose experiment was refused."""
        return [trial for trial in self.trials if trial.state in ("failed", "refused")]

    def seeds_done(self, point: Point) -> str:
        """Return how many seeds of a point have finished, of how many."""
        return f"{point.states.count('finished')} of {len(self.space.seeds)}"

    @property
    def failure_text(self) -> str:
        """How many trials failed, why the first one did, and how to resume where that can help; empty if none did."""
        if not self.failed:
            return ""
        first = self.failed[0]
        text = f"{len(self.failed)} of {len(self.trials)} trials failed, the first ({first.key}): {first.error}"
        if self.space.is_adaptive and all(trial.state == "refused" for trial in self.failed):
            return text
        return f"{text}. Fix the cause, then run: sylva-ray tune {as_argument(self.folder)} --resume"

    @property
    def counts(self) -> dict[str, int]:
        """Number of trials per state, for those `STATES` that occur."""
        states = [trial.state for trial in self.trials]
        return {state: states.count(state) for state in STATES if state in states}

    @property
    def workers(self) -> int:
        """The most workers that computed at the same time."""
        return max_overlap([(*span, trial.workers) for trial in self.trials for span in trial.spans])

    @property
    def seconds(self) -> float:
        """Wall seconds in which at least one trial ran."""
        return union_length([span for trial in self.trials for span in trial.spans])

    @property
    def busy_share(self) -> float:
        """Fraction of the workers' time that went into computing, in [0, 1]."""
        return sum(trial.busy for trial in self.trials) / max(1e-9, self.workers * self.seconds)


@dataclass(frozen=True)
class SweepSummary:
    """``sweep.json``.

    Attributes:
        name: of the space.
        objectives: what was sought.
        workers: see `Sweep.workers`.
        seconds: see `Sweep.seconds`.
        busy_share: see `Sweep.busy_share`.
        points: best first.
        trials: all of them.
    """

    name: str
    objectives: Sequence[Objective]
    workers: int
    seconds: float
    busy_share: float
    points: Sequence[Point]
    trials: Sequence[TrialResult]

    @classmethod
    def from_sweep(cls, sweep: Sweep) -> SweepSummary:
        """Take the part of a sweep's results that is written."""
        space = sweep.space
        return cls(
            space.name, space.objectives, sweep.workers, sweep.seconds, sweep.busy_share, sweep.points, sweep.trials
        )

    def to_json(self) -> dict[str, JsonValue]:
        """Return plain values that ``json.dumps`` takes."""
        return asdict(self) | {"objectives": [objective.model_dump() for objective in self.objectives]}


def union_length(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals.

    >>> union_length([(0, 2), (1, 3), (5, 6)])
    4
    """
    total, end = 0.0, -np.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total if total % 1 else int(total)


def max_overlap(spans: Sequence[tuple[float, float, int]]) -> int:
    """Return the largest sum of the weights of intervals ``(began, ended, weight)`` that overlap.

    >>> max_overlap([(0, 2, 1), (1, 3, 5), (2, 4, 1)]), max_overlap([])
    (6, 0)
    """
    changes = sorted([(began, weight) for began, _, weight in spans] + [(ended, -weight) for _, ended, weight in spans])
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def collect_results(folder: SweepFolder, space: Space, trials: Sequence[Trial], failures: Mapping[str, str]) -> Sweep:
    """Read the results from the run folders.

    Args:
        folder: the sweep's folder.
        space: its space.
        trials: all of its trials.
        failures: Tune's errors of trials that died in every attempt, by key.
    """
    results = [_read_trial(folder, space, trial, failures.get(trial.key)) for trial in trials]
    return Sweep.from_trials(space, results, folder.root)


def _read_trial(folder: SweepFolder, space: Space, trial: Trial, failure: str | None) -> TrialResult:
    run, history = folder.trial(trial.key), folder.history(trial.key)
    records, summary = run.load_records(), run.load_summary()
    last = history[-1] if history else None
    outcome = folder.outcome(trial.key)
    ended = outcome if outcome in ("pruned", "refused") else "failed"
    state = "finished" if summary else "failed" if failure is not None and outcome != "refused" else ended
    try:
        config = space.config(trial.values, trial.seed)
        steps = [(records[n - 1].step, step_metrics(records[:n], config)) for n in range(1, len(records) + 1)]
        workers = int(config.cluster.num_actors)
    except UserError:  # a point of Optuna's that is not a valid experiment
        steps, workers = [], 0
    spans: dict[float, float] = {}
    for event in history:  # an attempt that was killed has no end: its last event counts
        spans[event.began] = next(time for time in (event.ended, event.alive, event.began) if time is not None)
    return TrialResult(
        trial.key,
        trial.point,
        trial.values,
        trial.seed,
        state,
        steps[-1][1] if steps else {},
        steps,
        sum(is_exchange(record.stage) for record in records),
        list(spans.items()),
        workers,
        busy_seconds(records),
        [check.name for check in (summary.checks if summary else ()) if not check.passed],
        _why(state, failure, last),
    )


def _why(state: str, failure: str | None, last: AttemptEvent | None) -> str:
    """Return why a trial failed or was refused; empty for one that did not."""
    if state not in ("failed", "refused"):
        return ""
    said = last.error if last is not None else None
    return (said if state == "refused" else failure or said) or "its process ended before it could say why"


def _points(space: Space, trials: Sequence[TrialResult]) -> list[Point]:
    groups: dict[str, list[TrialResult]] = {}
    for trial in trials:
        groups.setdefault(trial.point, []).append(trial)
    points = [_point(space, group) for group in groups.values()]
    complete = [point for point in points if point.complete]
    front = {point.name for point in front_of(complete, space.objectives)}
    if len(space.objectives) == 1 and front:
        front = {max(complete, key=lambda point: _rank(point, space.objectives[0])).name}
    marked = [replace(point, chosen=point.name in front) for point in points]
    ordered = sorted(marked, key=lambda point: _rank(point, space.objectives[0]), reverse=True)
    return sorted(ordered, key=lambda point: not point.complete)


def _rank(point: Point, objective: Objective) -> tuple[float, ...]:
    """Return what points are ordered by: the objective; of equal ones benign, then robust accuracy."""
    others = (point.metrics[name].mean if name in point.metrics else 0.0 for name in ACCURACIES[:2])
    return _score(point, objective), *others


def _point(space: Space, group: Sequence[TrialResult]) -> Point:
    first = group[0]
    finished = [trial for trial in group if trial.state == "finished"]
    metrics = {}
    for name in finished[0].metrics if finished else ():
        value = SeedMean.from_values(trial.metrics[name] for trial in finished)
        assert value is not None
        metrics[name] = value
    return Point(
        first.point,
        point_label(first.values),
        first.values,
        [trial.seed for trial in group],
        [trial.state for trial in group],
        metrics,
        len(finished) == len(space.seeds),
        False,
        sorted({check for trial in group for check in trial.checks}),
    )


def _score(point: Point, objective: Objective) -> float:
    """Return a score of which more is better; the lowest for an incomplete point without the metric."""
    value = point.metrics.get(objective.metric)
    return -np.inf if value is None else objective.sign() * value.mean


def front_of(points: Sequence[Point], objectives: Sequence[Objective]) -> list[Point]:
    """Return the points that no other point dominates in the objectives."""
    values = [[point.metrics[objective.metric].mean for objective in objectives] for point in points]
    above = dominators(values, maximize=[objective.mode == "max" for objective in objectives])
    return [point for point, indices in zip(points, above, strict=True) if not indices]


# -- files -------------------------------------------------------------------------------------------------------------


def value_cell(metric: str, value: SeedMean | None) -> str:
    """Format a metric: accuracies in per cent, costs as sizes or seconds, an en dash for None.

    >>> value_cell("robust_accuracy", SeedMean(0.628, 0.012, 3)), value_cell("total_bytes", SeedMean(893_948, None, 1))
    ('62.8 ± 1.2', '894 kB')
    """
    if value is None:
        return "–"

    def text(number: float) -> str:
        if metric == "total_bytes":
            return bytes_text(number)
        return f"{number:,.0f}" if metric in COSTS else f"{100 * number:.1f}"

    return text(value.mean) if value.std is None else f"{text(value.mean)} ± {text(value.std)}"


def shown_metrics(space: Space) -> list[str]:
    """Return the objectives, then the accuracies and costs that are in every table."""
    wanted = [objective.metric for objective in space.objectives] + [ACCURACIES[0], ACCURACIES[1], *COSTS]
    return list(dict.fromkeys(wanted))


def markdown(sweep: Sweep) -> str:
    """Return the table of points, for MLflow's page of the parent run."""
    metrics = shown_metrics(sweep.space)
    lines = ["| | point | " + " | ".join(metrics) + " |", "|---|---|" + "---:|" * len(metrics)]
    for point in sweep.points:
        cells = [value_cell(name, point.metrics.get(name)) for name in metrics]
        state = "**best**" if point.chosen and len(sweep.space.objectives) == 1 else "**front**" if point.chosen else ""
        state = state or ("" if point.complete else ", ".join(sorted(set(point.states))))
        lines.append(f"| {state} | {point.label} (`{point.name}`) | " + " | ".join(cells) + " |")
    busy = f"{100 * sweep.busy_share:.0f} % of {sweep.workers} workers' time"
    return "\n".join([*lines, "", f"Accuracies in %. {len(sweep.trials)} trials; computing took {busy}."])

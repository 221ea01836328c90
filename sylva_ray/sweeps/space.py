"""The space of a sweep: which experiments it runs, its objectives, and how trials share the cluster.

::

    base:  ../configs/digits.yaml            an experiment, relative to this file; or the name of a recipe
    experiment:  {training: {rounds: 2}}     changes of it for all trials
    parameters:                              dotted keys of the experiment
      lora.rank: {grid: [2, 8]}
      attack.epsilon: {loguniform: [1/255, 16/255]}
    objectives: [{metric: robust_accuracy, mode: max}]

A point is one choice of the parameters; a trial is a point with a seed, and is one experiment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.cluster import ClusterSection
from sylva_ray.config.experiment import ExperimentConfig, with_stored_paths
from sylva_ray.config.recipes import recipes
from sylva_ray.config.schema import (
    FileKind,
    build,
    leaves,
    merged,
    parse_override,
    read_overridden,
    read_yaml,
    set_dotted,
)
from sylva_ray.core.errors import UserError, asked_as
from sylva_ray.core.locations import local_path
from sylva_ray.core.sections import Count, Name, PixelUnits, PlainValue, Section, Seed, conflict, parse_fraction
from sylva_ray.core.yaml import to_yaml
from sylva_ray.preparation.resolve import resolve_trial
from sylva_ray.sweeps.metrics import COSTS, METRICS, needs_attack

PARAMETER_KINDS = ("grid", "choice", "uniform", "loguniform", "randint")
MAX_GRID = 10_000
"""Points of a grid, all of which are checked before anything starts."""

NOT_SWEPT = ("name", "seed", "cluster", "tracking")
"""Sections that do not change the result, and keys that a space has itself."""


class Parameter(Section):
    """Where the values of one dotted key come from; exactly one of the five keys is given."""

    grid: tuple[PlainValue, ...] | None = Field(None, description="every value is tried")
    choice: tuple[PlainValue, ...] | None = Field(None, description="one of these is drawn")
    uniform: tuple[PixelUnits, PixelUnits] | None = Field(None, description="[low, high]; fractions such as 8/255 too")
    loguniform: tuple[PixelUnits, PixelUnits] | None = Field(None, description="the same, uniform in the logarithm")
    randint: tuple[int, int] | None = Field(None, description="[low, high], both included")

    @field_validator("grid", "choice")
    @classmethod
    def _check_list(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if values is not None and not values:
            raise ValueError("the list is empty: give at least one value")
        if values is not None and len({_canonical(value) for value in values}) < len(values):
            raise ValueError("a value is listed twice")
        return values

    @field_validator("uniform", "loguniform", "randint")
    @classmethod
    def _check_range(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError("the range is empty: give [low, high] with low below high")
        return ends

    @model_validator(mode="after")
    def _check_kind(self) -> Parameter:
        given = [kind for kind in PARAMETER_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"must have exactly one of {', '.join(PARAMETER_KINDS)}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("a loguniform range must begin above 0")
        return self

    @property
    def kind(self) -> str:
        """Which of the five is given."""
        return next(kind for kind in PARAMETER_KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The list, or the two ends of the range."""
        return tuple(getattr(self, self.kind))


def _canonical(value: Any) -> str:
    """Return the same text for two spellings of a value, e.g. 2 and 2.0, 4/255 and 0.0156..."""
    with suppress(ValueError):  # a text with a slash may be a path
        value = parse_fraction(value)
    return json.dumps(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)


class Objective(Section):
    """A metric that a sweep optimises, see `sylva_ray.sweeps.metrics`. By default costs are minimised."""

    metric: str = "robust_accuracy"
    mode: Literal["max", "min"] = "max"

    @model_validator(mode="before")
    @classmethod
    def _costs_are_minimised(cls, raw: Any) -> Any:
        is_cost = isinstance(raw, Mapping) and raw.get("metric") in COSTS
        return {"mode": "min", **raw} if is_cost else raw

    @field_validator("metric")
    @classmethod
    def _check_metric(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"must be one of {', '.join(METRICS)}")
        return metric

    def sign(self) -> int:
        """Return 1 where more is better, else -1."""
        return 1 if self.mode == "max" else -1


class Search(Section):
    """Which points are tried: all of a grid, random ones, or those that Optuna's TPE suggests."""

    kind: Literal["grid", "random", "optuna"] = "grid"
    num_points: int | None = Field(None, ge=1, le=MAX_GRID, description="for random and optuna")
    seed: Seed = 0


class Scheduler(Section):
    """Which trials are pruned; ``asha`` (Li et al. 2020) continues ``1 / reduction_factor`` of those at a rung."""

    kind: Literal["fifo", "asha"] = "fifo"
    grace_rounds: Count = Field(1, description="the first rung; the others are this times powers of reduction_factor")
    reduction_factor: float = Field(3, gt=1)


class Trials(Section):
    """How trials share the cluster. What one trial reserves is in the experiment's ``cluster`` section."""

    at_once: Count | Literal["auto"] = Field("auto", description="auto: as many as fit")
    retries: int = Field(2, ge=0, description="how often a trial whose process died continues from its last round")


class Space(Section):
    """A sweep. After `load_space`, ``experiment`` is the whole base with the changes merged in."""

    name: Name = "sweep"
    base: str | None = None
    experiment: dict[str, PlainValue] = Field({})
    parameters: dict[str, Parameter]
    seeds: tuple[Seed, ...] = (0,)
    objectives: tuple[Objective, ...] = Field((Objective(),), min_length=1)
    search: Search = Search()
    scheduler: Scheduler = Scheduler()
    trials: Trials = Trials()

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError("must be one or more different numbers from 0 on")
        return seeds

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, parameters: dict[str, Parameter]) -> dict[str, Parameter]:
        if not parameters:
            raise ValueError("must name at least one key of the experiment, e.g. lora.rank: {grid: [2, 8]}")
        return parameters

    @model_validator(mode="after")
    def _check_together(self) -> Space:
        search, is_grid = self.search, self.search.kind == "grid"
        for key, parameter in self.parameters.items():
            given = f"parameters.{key}", parameter.kind
            if key.split(".")[0] in NOT_SWEPT:
                fix = "seeds are listed under `seeds`" if key == "seed" else "it changes no result"
                raise conflict(*given, f"cannot be swept: {fix}")
            inner = next((other for other in self.parameters if other.startswith(f"{key}.")), None)
            if inner is not None:
                raise conflict(*given, f"is a section that holds {inner}, which is swept as well: sweep one of them")
            if is_grid != (parameter.kind == "grid"):
                wanted = "lists under `grid`" if is_grid else "`choice` or a range"
                raise conflict(*given, f"does not go with {search.kind} search: use {wanted}")
        if is_grid and math.prod(len(parameter.values) for parameter in self.parameters.values()) > MAX_GRID:
            raise conflict("search.kind", "grid", f"has more than {MAX_GRID} points: use random or optuna")
        if not is_grid and search.num_points is None:
            raise conflict("search.num_points", None, f"must be given for {search.kind} search")
        if is_grid and search.num_points is not None:
            raise conflict("search.num_points", search.num_points, "has no effect on a grid: leave it out")
        metrics = [objective.metric for objective in self.objectives]
        if len(set(metrics)) < len(metrics):
            raise conflict("objectives", metrics, "must be different metrics")
        if self.scheduler.kind == "asha" and len(self.objectives) > 1:
            raise conflict("scheduler.kind", "asha", "prunes by one metric: use fifo with several objectives")
        return self

    # -- experiments ---------------------------------------------------------------------------------------------------

    def config(self, values: Mapping[str, JsonValue], seed: int) -> ExperimentConfig:
        """Return the experiment of one trial.

        Args:
            values: of the parameters.
            seed: of the experiment.

        Raises:
            UserError: the values do not make a valid experiment.
        """
        raw = deepcopy(self.experiment)
        for key, value in values.items():
            set_dotted(raw, key, deepcopy(value))
        config = build(ExperimentConfig, raw | {"name": self.name, "seed": seed})
        create_algorithm(config.algorithm)
        return resolve_trial(config)

    @cached_property
    def cluster(self) -> ClusterSection:
        """Where trials run, which no parameter changes."""
        return build(ClusterSection, self.experiment.get("cluster") or {}, "cluster")

    @property
    def is_adaptive(self) -> bool:
        """Whether the points that are tried or pruned depend on results."""
        return self.search.kind == "optuna" or self.scheduler.kind == "asha"

    def to_yaml(self) -> str:
        """Return the space as YAML that needs no other file."""
        return to_yaml(self.model_dump(mode="json", exclude_none=True))


SPACE_FILE = FileKind(
    example="`sylva-ray list recipes` has examples",
    smallest="a space has a base or an experiment, and parameters",
    sections="base: and parameters:",
)


def load_space(path: Path, overrides: Sequence[str] = ()) -> Space:
    """Read and check a space.

    Args:
        path: YAML file.
        overrides: ``KEY=VALUE``; a key of the space (``search.num_points=30``) changes the space, any other key
            (``training.rounds=5``) the experiment of all trials.

    Raises:
        UserError: names key, value and fix.
    """
    given = _Overrides.from_texts(overrides)
    with asked_as("SPACE", "file"):
        raw = read_overridden(path, given.space, SPACE_FILE)
    experiment, parameters = raw.get("experiment") or {}, raw.get("parameters") or {}
    for key, value in (("experiment", experiment), ("parameters", parameters)):
        if not isinstance(value, dict):
            raise UserError(key, value, "must be a mapping")
    changes = [{key: value} for key, value in given.experiment]
    if raw.get("base") is not None:
        changes.append(experiment)
        base = path.parent / local_path("base", str(raw["base"]))
        if not base.is_file() and str(raw["base"]) in recipes():
            base = recipes()[str(raw["base"])].path
        if not base.is_file():
            raise UserError("base", raw["base"], f"there is no such file beside {path}")
        with asked_as("base", "file"):
            experiment = merged(read_yaml(base), experiment)
    for key, value in given.experiment:
        set_dotted(experiment, key, value)
    parameters = {
        str(key): with_stored_paths(values, str(key)) for key, values in (parameters | given.parameters).items()
    }
    changed = {"experiment": with_stored_paths(experiment), "parameters": parameters, "base": None}
    space = resolved_space(raw | changed)
    for change in changes:
        _check_has_an_effect(space, change)
    _check_search(space)
    return space


def resolved_space(raw: Mapping[str, Any]) -> Space:
    """Build a space that needs no other file, from the mapping that `Space.to_yaml` writes.

    Raises:
        UserError: names key, value and fix.
    """
    parameters = raw.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise UserError("parameters", parameters, "must be a mapping")
    for key, value in parameters.items():
        if not isinstance(value, Mapping):
            example = value if isinstance(value, list) else [value]
            fix = f"must say where values come from, e.g. {{grid: {json.dumps(example, default=str)}}}"
            raise UserError(f"parameters.{key}", value, fix)
    built = {str(key): build(Parameter, value, f"parameters.{key}") for key, value in parameters.items()}
    return build(Space, dict(raw) | {"parameters": built})


def _check_search(space: Space) -> None:
    """Refuse what a new sweep should not have; one of an older version that has it goes on.

    Raises:
        UserError: names key, value and fix.
    """
    search, scheduler = space.search, space.scheduler
    if search.kind == "grid" and search.seed:
        raise UserError("search.seed", search.seed, "has no effect on a grid: leave it out")
    if "kind" not in scheduler.model_fields_set and scheduler != Scheduler():
        given = sorted(scheduler.model_fields_set)[0]
        fix = "has no effect without scheduler.kind=asha; give scheduler.kind=fifo to prune nothing"
        raise UserError(f"scheduler.{given}", getattr(scheduler, given), fix)
    if scheduler.kind == "asha" and len(space.seeds) > 1:
        fix = "prunes single trials, so that few points would keep all of their seeds: give one, and try the best "
        raise UserError("scheduler.kind", "asha", f"{fix}points with others afterwards")


def _check_has_an_effect(space: Space, change: Mapping[str, JsonValue]) -> None:
    """Refuse a change of the experiment that a parameter, or the space itself, would override in every trial."""
    for key, instead in (("seed", f"seeds={list(space.seeds)}"), ("name", f"name={space.name}")):
        if key in change:
            raise UserError(key, change[key], f"has no effect on a sweep, whose trials have `{instead}`: change that")
    for swept in space.parameters:
        for key, value in leaves(change):
            if key == swept or key.startswith(f"{swept}."):
                raise UserError(key, value, f"is swept by this space; change parameters.{swept}")


@dataclass
class _Overrides:
    """Overrides by what they change.

    Attributes:
        space: texts ``KEY=VALUE`` with a key of the space.
        parameters: whole parameters, e.g. of ``parameters.lora.rank={grid: [2]}``.
        experiment: dotted keys and values of the experiment of all trials.
    """

    space: list[str] = field(default_factory=list)
    parameters: dict[str, JsonValue] = field(default_factory=dict)
    experiment: list[tuple[str, JsonValue]] = field(default_factory=list)

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> _Overrides:
        """Parse ``KEY=VALUE`` texts."""
        overrides = cls()
        for text in texts:
            key, value = parse_override(text)
            section, _, rest = key.partition(".")
            is_inner = bool(rest) if section in ("parameters", "experiment") else section not in Space.model_fields
            if not is_inner:
                overrides.space.append(text)
            elif section == "parameters":
                overrides.parameters[rest] = value
            else:
                overrides.experiment.append((rest if section == "experiment" else key, value))
        return overrides


def check_measured(space: Space, config: ExperimentConfig) -> None:
    """Check that an experiment is evaluated as the scheduler and the objectives need it.

    Raises:
        UserError: names key, value and fix.
    """
    robust = [objective.metric for objective in space.objectives if needs_attack(objective.metric)]
    if robust and not config.evaluation.attacks:
        raise UserError("objectives.metric", robust[0], "needs an attack: evaluation.attacks is empty")
    if space.scheduler.kind == "asha":
        if config.evaluation.every != 1:
            fix = "must be 1 with scheduler.kind=asha, which compares trials after every round"
            raise UserError("evaluation.every", config.evaluation.every, fix)
        if space.scheduler.grace_rounds >= config.training.rounds:
            fix = f"must be below training.rounds, which is {config.training.rounds}: no trial would be pruned"
            raise UserError("scheduler.grace_rounds", space.scheduler.grace_rounds, fix)

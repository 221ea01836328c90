"""Points and trials of a space, in a fixed order, and the check of their experiments before anything starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import JsonValue

from sylva_ray.config.comparison import result_settings
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import parse_fraction
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.text import BUDGETS, of_255
from sylva_ray.preparation.experiment import prepare, with_parameters
from sylva_ray.reports.compare.rows import short_key
from sylva_ray.sweeps.space import Parameter, Space, check_measured

MAX_CORNERS = 4096
"""Up to so many corners, all of them are checked; in a larger space, each value is checked once."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Where in a range its inner point lies: never at a whole number if the ends are whole numbers."""

MAX_REDRAWS = 100
"""How often a point that has been drawn before is drawn again."""


PointValues = Mapping[str, JsonValue]
"""The values of a point: ``{dotted key: value}``."""


@dataclass(frozen=True)
class Trial:
    """One experiment of a sweep: a point with a seed.

    Attributes:
        values: values of the parameters.
        seed: seed of the experiment.
    """

    values: PointValues
    seed: int

    @property
    def point(self) -> str:
        """The point's name, the same for all its seeds and in every sweep."""
        return point_id(self.values)

    @property
    def key(self) -> str:
        """The trial's name and the name of its folder."""
        return f"{self.point}-s{self.seed}"


def point_id(values: PointValues) -> str:
    """Return a point's name: eight hexadecimal digits of its values' hash."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()


def point_label(values: PointValues) -> str:
    """Return a point's label for people.

    >>> point_label({"lora.rank": 2, "attack.epsilon": "8/255"})
    'rank=2, epsilon=8/255'
    """
    return ", ".join(f"{short_key(key)}={value_text(key, value)}" for key, value in values.items())


def value_text(key: str, value: Any) -> str:
    """Format a value of a setting for a table.

    >>> value_text("training.lr", 0.0123456), value_text("attack.epsilon", 0.0123456)
    ('0.01235', '3.148/255')
    >>> value_text("algorithm", {"name": "sylva", "heads": "local"})
    'sylva, heads=local'
    """
    if isinstance(value, float):
        return of_255(value) if key.endswith(BUDGETS) else f"{value:.4g}"
    if isinstance(value, Mapping):
        rest = [f"{part}={value_text(part, inner)}" for part, inner in value.items() if part != "name"]
        return ", ".join([str(value["name"]), *rest] if "name" in value else rest)
    return str(value)


def number_of(value: Any) -> float | None:
    """Return a value's place on an axis: of a number or a fraction such as "8/255"; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return float(parse_fraction(value))
    except (TypeError, ValueError):
        return None


def planned_trials(space: Space) -> list[Trial]:
    """List all trials of a grid or random search, seeds innermost.

    Optuna's points are not known before the sweep: they depend on results.
    """
    points = _grid(space) if space.search.kind == "grid" else _random(space)
    return [Trial(values, seed) for values in points for seed in space.seeds]


def _grid(space: Space) -> Iterator[dict[str, JsonValue]]:
    keys = list(space.parameters)
    for values in itertools.product(*(parameter.values for parameter in space.parameters.values())):
        yield dict(zip(keys, values, strict=True))


def _random(space: Space) -> list[dict[str, JsonValue]]:
    """Draw point i from stream i, so that a larger ``num_points`` keeps the points of a smaller one."""
    assert space.search.num_points is not None
    points: dict[str, dict[str, JsonValue]] = {}
    for number in range(space.search.num_points):
        rng = numpy_generator(space.search.seed, "random search", round=number)
        for _ in range(MAX_REDRAWS):
            values = {key: _draw(parameter, rng) for key, parameter in space.parameters.items()}
            if point_id(values) not in points:
                points[point_id(values)] = values
                break
    return list(points.values())


def _draw(parameter: Parameter, rng: np.random.Generator) -> Any:
    values = parameter.values
    match parameter.kind:
        case "uniform":
            return float(rng.uniform(*values))
        case "loguniform":
            return float(math.exp(rng.uniform(math.log(values[0]), math.log(values[1]))))
        case "randint":
            return int(rng.integers(values[0], values[1] + 1))
        case _:
            return values[int(rng.integers(len(values)))]


# -- checks ------------------------------------------------------------------------------------------------------------


def check_space(space: Space) -> None:
    """Check the experiment of every point or, in a continuous space, of every corner and of a point inside each range.

    Raises:
        UserError: for the first that cannot run; names its values.
    """
    drawn = [trial.values for trial in planned_trials(space)] if space.search.kind == "random" else []
    known: dict[str, PointValues] = {}
    names: dict[str, PointValues] = {}
    rounds: int | None = None
    for values in itertools.chain(corners(space), _inner_points(space), drawn):
        with _named_errors(values):
            config = built_experiment(space, values, space.seeds[0])
            check_measured(space, config)
        rounds = rounds or config.training.rounds
        if space.scheduler.kind == "asha" and config.training.rounds != rounds:
            fix = f"differs between points ({rounds} elsewhere), which scheduler.kind=asha cannot compare: use fifo"
            raise UserError("training.rounds", config.training.rounds, fix)
        same_name = names.setdefault(point_id(values), values)
        if space.search.kind == "grid" and same_name != values:
            fix = f"has the same name, {point_id(values)}, as {point_label(same_name)}: change one of them slightly"
            raise UserError("parameters", point_label(values), fix)
        other = known.setdefault(json.dumps(result_settings(config), sort_keys=True), values)
        if other != values:
            key = next(key for key, value in values.items() if value != other[key])
            fix = f"makes the same experiment as {other[key]!r} (at {point_label(values)}): leave one of them out"
            raise UserError(f"parameters.{key}", values[key], fix)


def built_experiment(space: Space, values: PointValues, seed: int) -> ExperimentConfig:
    """Return the experiment of a trial with every parameter of its method, so that spellings make no difference.

    Raises:
        UserError: the values do not make a valid experiment.
    """
    return with_parameters(space.config(values, seed))


def prepare_points(space: Space) -> None:
    """Prepare one experiment for each value of each parameter: data, backbone and method. Writes nothing.

    Raises:
        UserError: for the first that cannot run; names its values.
    """
    for values in _one_at_a_time(space):
        with _named_errors(values):
            prepare(space.config(values, space.seeds[0]), measure=False)


def resolve_first_point(space: Space, measure: bool) -> ExperimentConfig:
    """Resolve the first point, whose precision and attention kernels the sweep uses; ``measure`` as in `prepare`."""
    return prepare(space.config(next(_one_at_a_time(space)), space.seeds[0]), measure=measure).config


def corners(space: Space) -> Iterable[dict[str, JsonValue]]:
    """List a grid's points; otherwise all combinations of listed values and ends of ranges, up to `MAX_CORNERS`."""
    if space.search.kind != "grid" and math.prod(len(p.values) for p in space.parameters.values()) > MAX_CORNERS:
        return _one_at_a_time(space)
    return _grid(space)


def _one_at_a_time(space: Space) -> Iterator[dict[str, JsonValue]]:
    first = {key: parameter.values[0] for key, parameter in space.parameters.items()}
    yield first
    for key, parameter in space.parameters.items():
        for value in parameter.values[1:]:
            yield first | {key: value}


def _inner_points(space: Space) -> Iterator[dict[str, JsonValue]]:
    """Yield a point inside each range of real numbers, whose ends may happen to be whole numbers."""
    first = {key: parameter.values[0] for key, parameter in space.parameters.items()}
    for key, parameter in space.parameters.items():
        if parameter.kind in ("uniform", "loguniform"):
            low, high = parameter.values
            yield first | {key: low + (high - low) * GOLDEN}


@contextmanager
def _named_errors(values: PointValues) -> Iterator[None]:
    """Add the point to errors whose key is not one of its parameters."""
    try:
        yield
    except UserError as error:
        if error.key in values:
            raise
        raise UserError(error.key, error.value, f"{error.fix} (at {point_label(values)})") from None

"""Points and trials of a space, in a fixed order, and the proof before anything starts that each of them is an experiment."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import JsonValue

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import parse_fraction
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.preparation.experiment import prepare
from sylva_ray.reports.compare.rows import short_key
from sylva_ray.sweeps.space import Parameter, Space, check_measured

MAX_CORNERS = 4096
"""Corners of a space that are all built; of a larger one, each value is tried once."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Where in a range the point lies that stands for its inside; no whole number between whole numbers."""

REDRAWS = 100
"""A point that has been drawn before is drawn again, this often."""


PointValues = Mapping[str, JsonValue]
"""The values of a point: ``{dotted key: value}``."""


@dataclass(frozen=True)
class Trial:
    """One experiment of a sweep: a point (``values`` of the parameters) with a seed."""

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
    """Eight hexadecimal digits of the values' hash."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()


def point_label(values: PointValues) -> str:
    """For readers.

    >>> point_label({"lora.rank": 2, "attack.epsilon": "8/255"})
    'rank=2, epsilon=8/255'
    """
    return ", ".join(f"{short_key(key)}={value_text(value)}" for key, value in values.items())


def value_text(value: Any) -> str:
    """A value in a table.

    >>> value_text(0.0123456), value_text({"name": "sylva", "heads": "local"})
    ('0.01235', 'sylva, heads=local')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        rest = [f"{key}={value_text(part)}" for key, part in value.items() if key != "name"]
        return ", ".join([str(value["name"]), *rest] if "name" in value else rest)
    return str(value)


def number_of(value: Any) -> float | None:
    """A value's place on an axis: numbers and fractions such as "8/255"; None for what is neither."""
    if isinstance(value, bool):
        return None
    try:
        return float(parse_fraction(value))
    except (TypeError, ValueError):
        return None


def planned_trials(space: Space) -> list[Trial]:
    """All trials of a grid or random search, seeds innermost. (Optuna's points depend on results.)"""
    points = _grid(space) if space.search.kind == "grid" else _random(space)
    return [Trial(values, seed) for values in points for seed in space.seeds]


def _grid(space: Space) -> Iterator[dict[str, JsonValue]]:
    keys = list(space.parameters)
    for values in itertools.product(*(parameter.values for parameter in space.parameters.values())):
        yield dict(zip(keys, values, strict=True))


def _random(space: Space) -> list[dict[str, JsonValue]]:
    """Point i comes from draw i, so that more points keep those that there were."""
    assert space.search.num_points is not None
    found: dict[str, dict[str, JsonValue]] = {}
    for number in range(space.search.num_points):
        rng = numpy_generator(space.search.seed, "random search", round=number)
        for _ in range(REDRAWS):
            values = {key: _draw(parameter, rng) for key, parameter in space.parameters.items()}
            if point_id(values) not in found:
                found[point_id(values)] = values
                break
    return list(found.values())


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


# -- before anything starts ---------------------------------------------------------------------------------------------


def check_space(space: Space) -> None:
    """Build the experiment of every point that is known; of what is not, of every corner and of a point inside each range.

    Raises:
        UserError: the first that cannot run; says which values.
    """
    drawn = [trial.values for trial in planned_trials(space)] if space.search.kind == "random" else []
    for values in itertools.chain(corners(space), _inside(space), drawn):
        with _naming(values):
            check_measured(space, space.config(values, space.seeds[0]))


def prepare_points(space: Space) -> None:
    """Prepare (data, backbone, method, without writing anything) one experiment for each value of each parameter.

    Raises:
        UserError: the first that cannot run; says which values.
    """
    for values in _one_at_a_time(space):
        with _naming(values):
            prepare(space.config(values, space.seeds[0]), measure=False)


def resolved_first(space: Space, measure: bool) -> ExperimentConfig:
    """The first point, whose precision and attention kernels are those of the whole sweep; ``measure`` as in `prepare`."""
    return prepare(space.config(next(_one_at_a_time(space)), space.seeds[0]), measure=measure).config


def corners(space: Space) -> Iterable[dict[str, JsonValue]]:
    """All points of a grid; else all combinations of listed values and ends of ranges, if they are not too many."""
    if space.search.kind != "grid" and math.prod(len(p.values) for p in space.parameters.values()) > MAX_CORNERS:
        return _one_at_a_time(space)
    return _grid(space)


def _one_at_a_time(space: Space) -> Iterator[dict[str, JsonValue]]:
    first = {key: parameter.values[0] for key, parameter in space.parameters.items()}
    yield first
    for key, parameter in space.parameters.items():
        for value in parameter.values[1:]:
            yield first | {key: value}


def _inside(space: Space) -> Iterator[dict[str, JsonValue]]:
    """A point inside each range of real numbers, whose ends may be whole by chance."""
    first = {key: parameter.values[0] for key, parameter in space.parameters.items()}
    for key, parameter in space.parameters.items():
        if parameter.kind in ("uniform", "loguniform"):
            low, high = parameter.values
            yield first | {key: low + (high - low) * GOLDEN}


class _naming:
    """An error of a point whose key is not among its parameters names the point."""

    def __init__(self, values: PointValues) -> None:
        self.values = values

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError) and error.key not in self.values:
            raise UserError(error.key, error.value, f"{error.fix} (at {point_label(self.values)})") from None

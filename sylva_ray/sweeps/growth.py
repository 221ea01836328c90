"""A sweep that grows: the same folder, with more values of a grid, more seeds, or more points.

The trials that have finished keep their names and are not repeated. What would change the meaning of finished trials
(the experiment, the objectives, a range, a value that is gone) is refused. So are more seeds of an Optuna search, which
chose its points by means over the seeds.
"""

from __future__ import annotations

from typing import Any

from sylva_ray.config.comparison import FREE_SECTIONS, difference
from sylva_ray.core.errors import UserError
from sylva_ray.sweeps.points import built_experiment
from sylva_ray.sweeps.space import Parameter, Space


def grown_space(stored: Space, asked: Space, folder: str) -> Space:
    """Return the space that a folder holds, grown to the one that was asked for.

    A value that was there before keeps its spelling (``4/255`` for a decimal), because the names of trials are made
    from it. What changes no result is taken from ``asked``: ``trials``, and the experiment's ``cluster`` and
    ``tracking``.

    Args:
        stored: the space in the folder.
        asked: the present one.
        folder: for the error message.

    Raises:
        UserError: ``asked`` is not ``stored`` with more values, seeds or points; names the first difference.
    """
    for key in ("name", "objectives", "scheduler"):
        _require(getattr(stored, key) == getattr(asked, key), key, folder)
    _require(stored.search.kind == asked.search.kind and stored.search.seed == asked.search.seed, "search", folder)
    _require(stored.parameters.keys() == asked.parameters.keys(), "parameters", folder)
    parameters = {key: _grown_parameter(stored, asked, key, folder) for key in stored.parameters}
    _check_same_experiment(stored, asked, folder)
    seeds = [*stored.seeds, *(seed for seed in asked.seeds if seed not in stored.seeds)]
    _require(set(stored.seeds) <= set(asked.seeds), "seeds", folder)
    _require((asked.search.num_points or 0) >= (stored.search.num_points or 0), "search.num_points", folder)
    experiment = {name: section for name, section in stored.experiment.items() if name not in FREE_SECTIONS}
    experiment |= {name: section for name, section in asked.experiment.items() if name in FREE_SECTIONS}
    update = {
        "parameters": parameters,
        "seeds": tuple(seeds),
        "search": asked.search,
        "trials": asked.trials,
        "experiment": experiment,
    }
    if stored.search.kind == "optuna" and len(seeds) > len(stored.seeds):
        fix = "holds an Optuna search, which chose its points by means over its seeds: only search.num_points can grow"
        raise UserError("--out", folder, fix)
    return stored.model_copy(update=update)


def _grown_parameter(stored: Space, asked: Space, key: str, folder: str) -> Parameter:
    """Return a parameter with the stored values first, then the new ones; a range or a choice must be the same."""
    before, now = stored.parameters[key], asked.parameters[key]
    _require(before.kind == now.kind, f"parameters.{key}", folder)
    new = [value for value in now.values if not any(_is_same(stored, key, value, old) for old in before.values)]
    kept = [old for old in before.values if any(_is_same(stored, key, value, old) for value in now.values)]
    _require(len(kept) == len(before.values), f"parameters.{key}", folder)
    _require(not new or before.kind == "grid", f"parameters.{key}", folder)
    return Parameter(grid=(*before.values, *new)) if before.kind == "grid" else before


def _is_same(space: Space, key: str, a: Any, b: Any) -> bool:
    """Return whether two values of a parameter make the same experiment."""
    if a == b:
        return True
    if space.parameters[key].kind not in ("grid", "choice"):
        return False
    first = {name: parameter.values[0] for name, parameter in space.parameters.items()}
    try:
        return not difference(*(built_experiment(space, first | {key: value}, space.seeds[0]) for value in (a, b)))
    except UserError:  # a value that makes no experiment is reported by the check of all points
        return False


def _check_same_experiment(stored: Space, asked: Space, folder: str) -> None:
    first = {name: parameter.values[0] for name, parameter in stored.parameters.items()}
    found = difference(*(built_experiment(space, first, stored.seeds[0]) for space in (stored, asked)))
    if found:
        raise UserError("--out", folder, f"holds a sweep of another space ({found})")


def _require(holds: bool, key: str, folder: str) -> None:
    if not holds:
        fix = (
            f"holds a sweep of another space ({key} differs from its space.yaml; grids, seeds and points can be added)"
        )
        raise UserError("--out", folder, fix)

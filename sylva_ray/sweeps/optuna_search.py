"""Optuna for Ray Tune, for points with several seeds: the study learns of a point once, as the mean over its seeds.

    study ── point ──► trial (point, seed 1), trial (point, seed 2), ... ── all done ──► mean ──► study

Tune's own `OptunaSearch` knows no seeds. One objective or several: TPE samples for both.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from ray.tune.search import Searcher

from sylva_ray.sweeps.points import point_id
from sylva_ray.sweeps.space import Parameter, Space

TRIES = 50
"""How often Optuna may repeat itself before its space counts as exhausted."""


class PointSearch(Searcher):
    """Suggests ``{"trial": {"values": ..., "seed": ...}}``: ``search.num_points`` points, seeds innermost.

    A point of which a trial was pruned or failed is told as failed. A point that Optuna repeats is answered from memory."""

    def __init__(self, space: Space) -> None:
        super().__init__(metric=None, mode=None)
        assert space.search.num_points is not None, "checked by the space"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions = {key: _distribution(parameter) for key, parameter in space.parameters.items()}
        # choices may be lists or mappings, which Optuna takes for no categories: it gets their numbers
        self._choices = {key: p.values for key, p in space.parameters.items() if p.kind == "choice"}
        self._study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=space.search.seed),
            directions=["maximize" if objective.mode == "max" else "minimize" for objective in space.objectives],
        )
        self._metrics = [objective.metric for objective in space.objectives]
        self._seeds, self._points_left = space.seeds, space.search.num_points
        self._queue: list[dict[str, Any]] = []
        self._point_of: dict[str, str] = {}  # by Tune's trial
        self._number_of: dict[str, int] = {}  # Optuna's, by point
        self._results: dict[str, list[list[float] | None]] = {}

    def suggest(self, trial_id: str) -> Any:
        """See `Searcher.suggest`."""
        if not self._queue and self._points_left:
            self._points_left -= 1
            values = self._new_point()
            self._queue = [] if values is None else [{"values": values, "seed": seed} for seed in self._seeds]
        if not self._queue:
            self._points_left = 0
            return Searcher.FINISHED
        given = self._queue.pop(0)
        self._point_of[trial_id] = point_id(given["values"])
        return {"trial": given}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See `Searcher.on_trial_complete`. (Of single rounds the study hears nothing.)"""
        point = self._point_of.pop(trial_id, None)
        if point is None:
            return
        found = None if error or not result or not result.get("finished") else [result[name] for name in self._metrics]
        self._results[point].append(found)
        if len(self._results[point]) == len(self._seeds):
            self._tell(self._number_of[point], self._mean(point))

    def save(self, checkpoint_path: str) -> None:
        """See `Searcher.save`; a part of Tune's own state."""
        with open(checkpoint_path, "wb") as file:
            pickle.dump(self.__dict__, file)

    def restore(self, checkpoint_path: str) -> None:
        """See `Searcher.restore`."""
        with open(checkpoint_path, "rb") as file:
            self.__dict__.update(pickle.load(file))

    def _new_point(self) -> dict[str, Any] | None:
        """A point that has not been tried; None where there seems to be no other."""
        for _ in range(TRIES):
            asked = self._study.ask(self._distributions)
            values = {key: self._value(key, suggested) for key, suggested in asked.params.items()}
            point = point_id(values)
            if point not in self._results:
                self._number_of[point], self._results[point] = asked.number, []
                return values
            self._tell(asked.number, self._mean(point))
        return None

    def _value(self, key: str, suggested: Any) -> Any:
        return self._choices[key][suggested] if key in self._choices else suggested

    def _mean(self, point: str) -> list[float] | None:
        """Over the seeds; None unless all of them have finished."""
        found = [values for values in self._results[point] if values is not None]
        return np.mean(found, axis=0).tolist() if len(found) == len(self._seeds) else None

    def _tell(self, number: int, values: list[float] | None) -> None:
        self._study.tell(number, values, state=TrialState.FAIL if values is None else TrialState.COMPLETE)


def _distribution(parameter: Parameter) -> BaseDistribution:
    values = parameter.values
    match parameter.kind:
        case "uniform" | "loguniform":
            return FloatDistribution(values[0], values[1], log=parameter.kind == "loguniform")
        case "randint":
            return IntDistribution(values[0], values[1])
        case _:
            return CategoricalDistribution(range(len(values)))

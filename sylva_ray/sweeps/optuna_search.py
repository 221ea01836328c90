"""Optuna for Ray Tune, for points with several seeds: a point's objectives are their means over its seeds.

    study ── point ──► trial (point, seed 1), trial (point, seed 2), ... ── all done ──► mean ──► study

Tune's own `OptunaSearch` has no notion of seeds. TPE suggests the points, for one objective or several. The state of a
search is one JSON file beside Tune's own: a resumed search suggests what the uninterrupted one would have suggested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import TrialState
from pydantic import BaseModel, JsonValue, ValidationError, field_validator
from ray.tune.search import Searcher

from sylva_ray.core.errors import RunError
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.points import PointValues, Trial, point_id
from sylva_ray.sweeps.space import Parameter, Space

MAX_REPEATS = 50
"""How many repeated points in a row show that a space is exhausted."""

STUDY = "sweep"
"""The study's name in the journal."""

RandomState = tuple[str, list[int], int, int, float]
"""The state of a `numpy.random.RandomState`, as its ``get_state`` has it."""


class TrialChoice(BaseModel):
    """A suggested trial, as `sylva_ray.sweeps.points.Trial`."""

    values: dict[str, JsonValue]
    seed: int


class PointProgress(BaseModel):
    """What is known of a suggested point.

    Attributes:
        number: its number in the study; a point whose failed trial was repeated later has the newest of its numbers.
        results: by seed, the objectives of each of its trials that ended, None for one that was pruned or failed.
    """

    number: int
    results: dict[int, list[float] | None] = {}

    @field_validator("results", mode="before")
    @classmethod
    def _of_older_versions(cls, results: Any) -> Any:
        """Take the list of version 0.2, which does not say whose results they are: no seed is negative."""
        return {-1 - place: values for place, values in enumerate(results)} if isinstance(results, list) else results


class SearchState(BaseModel):
    """Everything that a search needs to continue.

    Attributes:
        points_left: points that are still to be suggested.
        queue: trials of the newest point that are still to be suggested.
        running: the trials that have not ended, by Tune's name of the trial.
        points: by name.
        journal: Optuna's own log of the study, one JSON object per operation.
        random_states: of the sampler; the journal does not hold them.
        is_exhausted: whether the space has no other points.
    """

    points_left: int
    queue: list[TrialChoice] = []
    running: dict[str, TrialChoice] = {}
    points: dict[str, PointProgress] = {}
    journal: list[str] = []
    random_states: list[RandomState] = []
    is_exhausted: bool = False


class JournalLines(BaseJournalBackend):
    """The journal of Optuna's `JournalStorage`, in memory.

    A file of its own would not do: Tune saves its state every few seconds and resumes from there, and the study must be
    exactly as old as that state. So the journal is saved with it.

    Args:
        lines: one JSON object per operation; grows with the study.
    """

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, JsonValue]]:
        """Yield the operations from a number on."""
        yield from map(json.loads, self.lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, JsonValue]]) -> None:
        """Add operations."""
        self.lines += map(json.dumps, logs)


class ResumableTPESampler(optuna.samplers.TPESampler):
    """TPE whose random state can be read and set, which Optuna offers only by pickle.

    Args:
        seed: of the search.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)

    @property
    def random_states(self) -> list[RandomState]:
        """The states of the generators of TPE and of the random search that it begins with."""
        states = (generator.get_state(legacy=True) for generator in self._generators())
        return [(name, np.asarray(words).tolist(), *rest) for name, words, *rest in states]

    def set_random_states(self, states: list[RandomState]) -> None:
        """Continue as the sampler did that had these ``random_states``."""
        for generator, (name, words, position, has_gauss, gauss) in zip(self._generators(), states, strict=True):
            generator.set_state((name, np.array(words, np.uint32), position, has_gauss, gauss))

    def _generators(self) -> tuple[np.random.RandomState, np.random.RandomState]:
        return self._rng.rng, self._random_sampler._rng.rng


class PointSearch(Searcher):
    """Suggests ``{"trial": {"values": ..., "seed": ...}}``: ``search.num_points`` points, seeds innermost.

    A point with a trial that was pruned or failed counts as failed. A point that Optuna repeats gets the result that it
    had and is not run again.

    Args:
        space: with ``search.kind: optuna``.
    """

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    def __init__(self, space: Space) -> None:
        super().__init__(metric=None, mode=None)
        assert space.search.num_points is not None, "checked by the space"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._distributions = {key: _distribution(parameter) for key, parameter in space.parameters.items()}
        self._sampler = ResumableTPESampler(space.search.seed)
        self._state = SearchState(points_left=space.search.num_points)
        self._study = optuna.create_study(
            study_name=STUDY,
            storage=optuna.storages.JournalStorage(JournalLines(self._state.journal)),
            sampler=self._sampler,
            directions=["maximize" if objective.mode == "max" else "minimize" for objective in space.objectives],
        )

    @property
    def study(self) -> optuna.Study:
        """Optuna's view of the points: one trial per suggestion."""
        return self._study

    @property
    def num_left(self) -> int:
        """Trials that are still to be suggested."""
        return len(self._state.queue) + self._state.points_left * len(self._space.seeds)

    @property
    def trials(self) -> list[Trial]:
        """The trials of all points that have been suggested, in that order, seeds innermost."""
        suggested = self._study.get_trials(deepcopy=False)
        points = [suggested[point.number].params for point in self._state.points.values()]
        values = [{key: self._value(key, value) for key, value in params.items()} for params in points]
        return [Trial(point, seed) for point in values for seed in self._space.seeds]

    def plan(self, failed: Sequence[Trial]) -> None:
        """Plan what a sweep that continues has left.

        First come the trials whose results the study does not have, then the points that ``search.num_points`` has
        beyond those that have been suggested, and the trials that failed.

        Args:
            failed: trials that are to be tried again.
        """
        assert self._space.search.num_points is not None
        state = self._state
        state.queue = [*state.running.values(), *state.queue]
        queued = [(choice.values, choice.seed) for choice in state.queue]
        again = [trial for trial in failed if (trial.values, trial.seed) not in queued]
        for trial in again:
            state.queue.append(TrialChoice(values=dict(trial.values), seed=trial.seed))
            results = state.points[trial.point].results
            nameless = next((seed for seed, values in results.items() if seed < 0 and values is None), trial.seed)
            results.pop(trial.seed if trial.seed in results else nameless, None)
        state.running = {}
        left = self._space.search.num_points - len(state.points)
        state.points_left = 0 if state.is_exhausted else left

    def to_json(self) -> str:
        """Return the state as `restore` reads it."""
        self._state.random_states = self._sampler.random_states
        return self._state.model_dump_json()

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of Tune's next trial; see `Searcher.suggest`."""
        state = self._state
        if not state.queue and state.points_left:
            state.points_left -= 1
            values = self._new_point()
            if values is not None:
                state.queue = [TrialChoice(values=dict(values), seed=seed) for seed in self._space.seeds]
            else:
                state.is_exhausted = True
        if not state.queue:
            state.points_left = 0
            return Searcher.FINISHED
        choice = state.queue.pop(0)
        state.running[trial_id] = choice
        return {"trial": choice.model_dump()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take the result of a trial that ended; see `Searcher.on_trial_complete`.

        Results of single rounds do not reach the study.
        """
        choice = self._state.running.pop(trial_id, None)
        if choice is None:
            return
        is_result = not error and result is not None and result.get("finished")
        values = [result[objective.metric] for objective in self._space.objectives] if is_result and result else None
        point = self._state.points[point_id(choice.values)]
        point.results[choice.seed] = values
        if len(point.results) == len(self._space.seeds):
            self._tell_result(point)

    def save(self, checkpoint_path: str) -> None:
        """Write the state as JSON; see `Searcher.save`."""
        write_atomically(Path(checkpoint_path), self.to_json())

    def restore(self, checkpoint_path: str) -> None:
        """Continue from a saved state; see `Searcher.restore`.

        Raises:
            RunError: the file is damaged.
        """
        try:
            self._state = SearchState.model_validate_json(Path(checkpoint_path).read_text())
        except ValidationError:
            raise RunError(
                "the saved state of the search is damaged: start the sweep again in another folder"
            ) from None
        self._sampler.set_random_states(self._state.random_states)
        storage = optuna.storages.JournalStorage(JournalLines(self._state.journal))
        self._study = optuna.load_study(study_name=STUDY, storage=storage, sampler=self._sampler)

    def _new_point(self) -> PointValues | None:
        """Return a point that has not been tried; None where there seems to be no other."""
        for _ in range(MAX_REPEATS):
            asked = self._study.ask(self._distributions)
            values = {key: self._value(key, suggested) for key, suggested in asked.params.items()}
            name = point_id(values)
            if name not in self._state.points:
                self._state.points[name] = PointProgress(number=asked.number)
                return values
            self._tell(asked.number, self._mean(self._state.points[name]))
        return None

    def _value(self, key: str, suggested: Any) -> Any:
        """Return a parameter's value; of a choice, Optuna suggests the index (choices may be lists or mappings)."""
        parameter = self._space.parameters[key]
        return parameter.values[suggested] if parameter.kind == "choice" else suggested

    def _mean(self, point: PointProgress) -> list[float] | None:
        """Average over the seeds; None unless all of them have finished."""
        values = [result for result in point.results.values() if result is not None]
        return np.mean(values, axis=0).tolist() if len(values) == len(self._space.seeds) else None

    def _tell_result(self, point: PointProgress) -> None:
        """Tell the study the result of a point; one that it has as failed gets another trial where all seeds finished.

        Optuna does not change a trial that has ended.
        """
        known, values = self._study.get_trials(deepcopy=False)[point.number], self._mean(point)
        if not known.state.is_finished():
            self._tell(point.number, values)
        elif known.state == TrialState.FAIL and values is not None:
            added = optuna.trial.create_trial(params=known.params, distributions=known.distributions, values=values)
            self._study.add_trial(added)
            point.number = len(self._study.get_trials(deepcopy=False)) - 1

    def _tell(self, number: int, values: list[float] | None) -> None:
        self._study.tell(number, values, state=TrialState.FAIL if values is None else TrialState.COMPLETE)


def open_search(space: Space, folder: SweepFolder) -> PointSearch:
    """Return the search of a sweep, new or from its newest saved state, with what is left planned.

    Raises:
        RunError: the saved state is damaged.
    """
    search = PointSearch(space)
    if states := folder.search_states():
        search.restore(str(states[-1]))
        search.plan([trial for trial in search.trials if _is_left(folder, trial.key)])
    return search


def _is_left(folder: SweepFolder, key: str) -> bool:
    """Return whether a suggested trial is to be tried again: it died, or was killed before it could say so."""
    return not folder.has_ended(key) and folder.outcome(key) != "refused"


def _distribution(parameter: Parameter) -> BaseDistribution:
    values = parameter.values
    match parameter.kind:
        case "uniform" | "loguniform":
            return FloatDistribution(values[0], values[1], log=parameter.kind == "loguniform")
        case "randint":
            return IntDistribution(values[0], values[1])
        case _:
            return CategoricalDistribution(range(len(values)))

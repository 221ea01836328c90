"""What the coordinator asks of clients in phase 2, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from sylva_ray.core.types import ClientState, ParameterStack, StateStack, unstack_states
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.stages.layer_game.client import GuardOutcome, Phase2Client
from sylva_ray.federation.stages.layer_game.rankings.ranking import Ranking
from sylva_ray.federation.stages.layer_game.rankings.shapley import ShapleyRanking
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.models.cohort import to_arrays, to_parameters


@dataclass(frozen=True)
class GameOutcome:
    """``values [m, 2]``: mean true-class probability on ``num_samples`` selection images, benign and robust, per coalition.

    ``benign_state`` is theta^b; ``block_evaluations`` counts blocks run per input set (2^(L+1) - 2 when exact); ``scores [n]``
    are there where the layers are ranked by something else than the game."""

    benign_state: ClientState
    values: np.ndarray
    num_samples: int
    block_evaluations: int
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class RefineOutcome:
    """``states[e]`` after benign epoch e + 1; ``guard`` has a column for theta^r and one for every epoch, ``m = 1 + epochs``."""

    states: tuple[ClientState, ...]
    guard: GuardOutcome


@dataclass(frozen=True)
class GameTask(CohortTask):
    """Values of the layer game's coalitions. ``states`` are the robust states (theta^r); ``coalitions [m, n] bool``.

    ``ranking`` says what is measured: values of the coalitions, scores of the layers, or nothing but theta^b."""

    coalitions: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    ranking: Ranking = field(default_factory=ShapleyRanking)

    stage: ClassVar[str] = "layer game"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[GameOutcome]:
        """See `CohortTask`."""
        with worker.stopwatch("game"):
            player = Phase2Client.from_task(worker, self, params)
            with worker.stopwatch("train"):
                benign = player.benign_end_point()
            found = self.ranking.measure(player, benign, self.coalitions)
        limit = worker.algorithm.parameters.phase2.max_images
        states = unstack_states(to_arrays(benign))
        return [
            GameOutcome(
                states[c], own.values, min(limit, len(player.data[c].selection)), own.block_evaluations, own.scores
            )
            for c, own in enumerate(found)
        ]


@dataclass(frozen=True)
class GuardTask(CohortTask):
    """Candidate selections under freshly made attacks on the guard split.

    ``benign_states`` (theta^b) like ``states``; ``candidates [C, m, n] bool``: m candidate coalitions per client."""

    benign_states: StateStack = field(default_factory=dict)
    candidates: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), bool))

    stage: ClassVar[str] = "guard"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[GuardOutcome]:
        """See `CohortTask`."""
        with worker.stopwatch("game"):
            benign = to_parameters(self.benign_states, worker.device, torch.float32)
            return Phase2Client.from_task(worker, self, params).guard_candidates(benign, self.candidates)


@dataclass(frozen=True)
class RefineTask(CohortTask):
    """Benign refinement of the selected layers only. ``selected [C, n] bool``."""

    selected: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))

    stage: ClassVar[str] = "refine"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[RefineOutcome]:
        """See `CohortTask`."""
        with worker.stopwatch("game"):
            epochs, guard = Phase2Client.from_task(worker, self, params).refine(self.selected)
        states = [unstack_states(to_arrays(epoch)) for epoch in epochs]
        return [RefineOutcome(tuple(epoch[c] for epoch in states), guard[c]) for c in range(len(self.clients))]

"""The tasks of phase 2 and their outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import torch_dtype
from sylva_ray.core.types import ClientState, ParameterStack, StateStack, unstack_states
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.client import PairedOutcomes, Phase2Client, effective_number
from sylva_ray.federation.stages.layer_game.rankings.ranking import Ranking
from sylva_ray.federation.stages.layer_game.values import coalition_values
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.models.cohort import to_arrays, to_parameters


@dataclass(frozen=True)
class GameOutcome:
    """What one client measured for the layer game.

    Attributes:
        benign_state: theta^b.
        values: ``[m, 2]``, the mean probability of the true class of every coalition on benign and on attacked
            selection images.
        num_samples: selection images, or the effective number of them where they have weights.
        block_evaluations: blocks run per input set; 2^(L+1) - 2 for all coalitions of L blocks.
        scores: ``[n]`` of the layers, if a score ranks them and not the game; otherwise None.
    """

    benign_state: ClientState
    values: np.ndarray
    num_samples: float
    block_evaluations: int
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class RefineOutcome:
    """What the refinement of one client results in.

    Attributes:
        states: at every strength.
        guard: of theta^r and of the state at every strength, ``m = 1 + strengths``, on the guard split.
    """

    states: tuple[ClientState, ...]
    guard: PairedOutcomes


@dataclass(frozen=True)
class GameTask(CohortTask):
    """Trains theta^b from the robust states theta^r (``states``) and measures what the ranking needs.

    Attributes:
        phase2: the parameters of phase 2.
        coalitions: ``[m, n] bool``.
        ranking: decides what is measured: values of the coalitions, scores of the layers, or nothing.
        precision: of the forwards that evaluate coalitions.
    """

    phase2: Phase2Parameters
    coalitions: np.ndarray
    ranking: Ranking
    precision: str = "float32"

    stage: ClassVar[str] = "layer game"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[GameOutcome]:
        """See `CohortTask`."""
        with worker.stopwatch("game"):
            player = Phase2Client.from_task(worker, self, params, self.phase2)
            player.value_precision = torch_dtype(self.precision)
            with worker.stopwatch("train"):
                benign = player.benign_end_point()
            measurements = self.ranking.measure(player, benign, self.coalitions)
        weights = player.weights(player.selection_splits)
        states = unstack_states(to_arrays(benign))
        return [
            GameOutcome(state, measured.values, effective_number(own), measured.block_evaluations, measured.scores)
            for state, own, measured in zip(states, weights, measurements, strict=True)
        ]


@dataclass(frozen=True)
class VerifyTask(CohortTask):
    """Compares the values of selected coalitions in a lower precision with those in float32.

    The outcome of a client is the largest difference between the two, of the value of a coalition minus that of the
    empty one.

    Attributes:
        phase2: the parameters of phase 2.
        benign_states: theta^b, stacked like ``states`` (theta^r).
        coalitions: ``[C, m, n] bool``, of every client; the first one is empty.
        precision: the lower one.
    """

    phase2: Phase2Parameters
    benign_states: StateStack
    coalitions: np.ndarray
    precision: str

    stage: ClassVar[str] = "verification"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[float]:
        """See `CohortTask`."""
        with worker.stopwatch("game"):
            benign = to_parameters(self.benign_states, worker.device, torch.float32)
            player = Phase2Client.from_task(worker, self, params, self.phase2)
            images = player.selection_images(benign)
            differences = []
            for client, coalitions in enumerate(self.coalitions):
                low, full = (
                    coalition_values(player, benign, coalitions, images, client, precision)[0]
                    for precision in (torch_dtype(self.precision), torch.float32)
                )
                differences.append(float(np.abs((low - low[0]) - (full - full[0])).max()))
        return differences


@dataclass(frozen=True)
class CandidatesTask(CohortTask):
    """Attacks candidate selections, each anew, on the selection split.

    Attributes:
        phase2: the parameters of phase 2.
        benign_states: theta^b, stacked like ``states`` (theta^r).
        candidates: ``[C, m, n] bool``, m candidate coalitions per client.
    """

    phase2: Phase2Parameters
    benign_states: StateStack
    candidates: np.ndarray

    stage: ClassVar[str] = "candidates"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[PairedOutcomes]:
        """See `CohortTask`."""
        with worker.stopwatch("game"):
            benign = to_parameters(self.benign_states, worker.device, torch.float32)
            return Phase2Client.from_task(worker, self, params, self.phase2).try_candidates(benign, self.candidates)


@dataclass(frozen=True)
class RefineTask(CohortTask):
    """Refines the selected layers on benign data.

    Attributes:
        phase2: the parameters of phase 2.
        selected: ``[C, n] bool``.
    """

    phase2: Phase2Parameters
    selected: np.ndarray

    stage: ClassVar[str] = "refine"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[RefineOutcome]:
        """See `CohortTask`."""
        with worker.stopwatch("game"):
            stacks, guard = Phase2Client.from_task(worker, self, params, self.phase2).refine(self.selected)
        by_strength = [unstack_states(stack) for stack in stacks]
        return [RefineOutcome(states, own) for states, own in zip(zip(*by_strength, strict=True), guard, strict=True)]

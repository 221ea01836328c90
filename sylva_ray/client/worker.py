"""A worker: a resident backbone and the data, able to run any task of any cohort. It knows nothing of Ray.

Everything that makes a client what it is comes with the task and leaves with the result, so a worker can die at any moment
and another one does the same work again, with the same bits.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sylva_ray.aggregation.byzantine import attackers_of, flip_labels
from sylva_ray.algorithms.base import Cohort
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.attacks.pgd import attack_predictions
from sylva_ray.client.batches import flat_split
from sylva_ray.client.layer_game import Phase2Client
from sylva_ray.client.local_training import train_cohort
from sylva_ray.config import ExperimentConfig
from sylva_ray.data.fleet import FleetData
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import CohortModel, FunctionalStack, to_arrays, to_parameters
from sylva_ray.models.lora import LoraStack
from sylva_ray.seeding import generator
from sylva_ray.timing import Stopwatch
from sylva_ray.types import (
    AttackSpec,
    ClientData,
    CohortResult,
    CohortTask,
    EvaluateOutcome,
    EvaluateTask,
    GameOutcome,
    GameTask,
    GuardOutcome,
    GuardTask,
    ParameterStack,
    RefineOutcome,
    RefineTask,
    Split,
    TrainOutcome,
    TrainTask,
    unstack_states,
)

EVALUATION_ROWS = 256
"""Images in one forward of an evaluation."""

COMPANION = "companion:"
"""Prefix of a companion's arrays among the weights that travel."""


def build_model(config: ExperimentConfig, num_classes: int, weights: Mapping[str, np.ndarray] | None) -> CohortModel:
    """The cohort model that the algorithm trains: adapters on a frozen backbone, or everything.

    ``weights`` may hold a companion's beside the backbone's own (`split_weights`)."""
    backbone = create_backbone(config.backbone, num_classes, None if weights is None else split_weights(weights)[0])
    if create_algorithm(config.algorithm).parameters.model == "full":
        return FunctionalStack(backbone)
    return LoraStack(backbone, config.lora)


def split_weights(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The backbone's arrays, and the companion's (a teacher's), which travel under `COMPANION`."""
    own = {name: value for name, value in weights.items() if not name.startswith(COMPANION)}
    companion = {n.removeprefix(COMPANION): value for n, value in weights.items() if n.startswith(COMPANION)}
    return own, companion


class CohortWorker:
    """Runs tasks one after the other.

    Args:
        config: resolved (no ``auto`` left in ``training``).
        fleet: every client's data; the arrays may be shared, read-only memory.
        backbone: the timm model's state_dict as numpy arrays.
    """

    def __init__(self, config: ExperimentConfig, fleet: FleetData, backbone: Mapping[str, np.ndarray]) -> None:
        torch.set_num_threads(config.cluster.threads_per_actor)
        torch.use_deterministic_algorithms(True)
        self.config, self.fleet = config, fleet
        self.attackers = attackers_of(config)
        self.device = torch.device(config.training.device)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
            torch.backends.cuda.matmul.allow_tf32 = False
        model = build_model(config, fleet.num_classes, backbone)
        assert isinstance(model, LoraStack | FunctionalStack)
        model.backbone.to(self.device)
        self.model = model
        self.algorithm = create_algorithm(config.algorithm)
        self.algorithm.attach(model, fleet.num_classes, split_weights(backbone)[1], self.device)

    def run(self, task: CohortTask) -> CohortResult:
        """Dispatch by the task's type."""
        self.clock = Stopwatch()
        params = to_parameters(task.states, self.device, torch.float32)
        bfloat16 = self.config.training.precision == "bfloat16" and isinstance(task, TrainTask)
        self.model.precision = torch.bfloat16 if bfloat16 else torch.float32
        outcomes: Sequence[Any]
        match task:
            case TrainTask():
                outcomes = self._train(task, params)
            case EvaluateTask():
                outcomes = self._evaluate(task, params)
            case GameTask():
                outcomes = self._game(task, params)
            case GuardTask():
                outcomes = self._guard(task, params)
            case RefineTask():
                outcomes = self._refine(task, params)
            case _:
                raise AssertionError(f"no such task: {type(task).__name__}")
        return CohortResult(task.clients, tuple(outcomes), dict(self.clock.seconds), peak_memory_bytes())

    # -- the five kinds of work ----------------------------------------------------------------------------------------

    def _train(self, task: TrainTask, params: ParameterStack) -> list[TrainOutcome]:
        data = [self._poisoned(client) for client in task.clients]
        with self.clock("train"):
            metrics = train_cohort(self._cohort(task, params), self.algorithm, params, data, task, self.config)
        states = unstack_states(to_arrays(params))
        return [
            TrainOutcome(state, len(own.train), {name: float(values[c]) for name, values in metrics.items()})
            for c, (state, own) in enumerate(zip(states, data, strict=True))
        ]

    @torch.no_grad()
    def _evaluate(self, task: EvaluateTask, params: ParameterStack) -> list[EvaluateOutcome]:
        splits = [self._split(client, task) for client in task.clients]
        noises = {attack.label: self._noises(task, attack, splits) for attack in task.attacks}
        answers: list[dict[str, list[np.ndarray]]] = [{} for _ in splits]
        rows = max(1, EVALUATION_ROWS // len(splits))
        with self.clock("evaluate"):
            for first in range(0, max(len(split) for split in splits), rows):
                window = slice(first, first + rows)
                pieces = [Split(split.images[window], split.labels[window]) for split in splits]
                x, y, owner = flat_split(pieces, torch.float32, self.device)
                found = {"benign": self.model.forward(params, x, owner).argmax(1)}
                for attack in task.attacks:
                    starts = [torch.cat([own[window] for own in draws]) for draws in noises[attack.label]]
                    with torch.enable_grad():
                        found[attack.label] = attack_predictions(
                            self.model, params, x, y, owner, attack, [s.to(self.device) for s in starts]
                        )
                for condition, predictions in found.items():
                    for client, own in enumerate(np.split(predictions.cpu().numpy(), _borders(pieces))):
                        answers[client].setdefault(condition, []).append(own)
        return [EvaluateOutcome({name: np.concatenate(own) for name, own in client.items()}) for client in answers]

    def _game(self, task: GameTask, params: ParameterStack) -> list[GameOutcome]:
        with self.clock("game"):
            player = self._phase2(task, params)
            with self.clock("train"):
                benign = player.benign_end_point()
            values, blocks = np.zeros((len(task.clients), 0, 2)), [0] * len(task.clients)
            scores: Sequence[np.ndarray | None] = [None] * len(task.clients)
            if task.selection == "shapley":
                values, blocks = player.coalition_values(benign, task.coalitions)
            elif task.selection in ("gates", "shift"):
                scores = list(player.layer_scores(benign, task.selection))
        limit = self.algorithm.parameters.phase2.max_images
        states = unstack_states(to_arrays(benign))
        return [
            GameOutcome(states[c], values[c], min(limit, len(own.selection)), blocks[c], scores[c])
            for c, own in enumerate(player.data)
        ]

    def _guard(self, task: GuardTask, params: ParameterStack) -> list[GuardOutcome]:
        with self.clock("game"):
            benign = to_parameters(task.benign_states, self.device, torch.float32)
            return self._phase2(task, params).guard_candidates(benign, task.candidates)

    def _refine(self, task: RefineTask, params: ParameterStack) -> list[RefineOutcome]:
        with self.clock("game"):
            epochs, guard = self._phase2(task, params).refine(task.selected)
        states = [unstack_states(to_arrays(epoch)) for epoch in epochs]
        return [RefineOutcome(tuple(epoch[c] for epoch in states), guard[c]) for c in range(len(task.clients))]

    # -- what they share -----------------------------------------------------------------------------------------------

    def _cohort(self, task: CohortTask, params: ParameterStack) -> Cohort:
        counts = np.stack([self.fleet.label_matrix()[client] for client in task.clients])
        received = {name: value.clone() for name, value in params.items()}
        return Cohort(self.model, torch.from_numpy(counts).to(self.device), received, self.clock)

    def _phase2(self, task: CohortTask, params: ParameterStack) -> Phase2Client:
        return Phase2Client(
            self._cohort(task, params),
            self.algorithm.parameters.phase2,
            self.config,
            params,
            task.clients,
            self._data(task),
            task.round,
            self.algorithm.trains,
        )

    def _data(self, task: CohortTask) -> list[ClientData]:
        return [self.fleet.client(client) for client in task.clients]

    def _poisoned(self, client: int) -> ClientData:
        """A client's data; an attacker by label flipping trains on flipped labels."""
        data = self.fleet.client(client)
        if self.config.byzantine.attack != "label_flip" or client not in self.attackers:
            return data
        return replace(data, train=Split(data.train.images, flip_labels(data.train.labels, self.fleet.num_classes)))

    def _split(self, client: int, task: EvaluateTask) -> Split:
        test = self.fleet.client(client).test
        return Split(test.images[: task.max_samples], test.labels[: task.max_samples])

    def _noises(self, task: EvaluateTask, attack: AttackSpec, splits: list[Split]) -> list[list[torch.Tensor]]:
        """``[restart][client]`` uniform noise in [-1, 1]: a client's own, and the same at every evaluation."""
        if not attack.random_start:
            return []
        return [
            [
                torch.rand(split.images.shape, generator=generator(self.config.seed, f"{attack.label}/{restart}", c))
                * 2
                - 1
                for c, split in zip(task.clients, splits, strict=True)
            ]
            for restart in range(attack.restarts)
        ]


def _borders(pieces: list[Split]) -> np.ndarray:
    return np.cumsum([len(piece) for piece in pieces])[:-1]


def peak_memory_bytes() -> int:
    """High-water mark of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

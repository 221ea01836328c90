"""A worker: a resident backbone and the data, able to run any task of any cohort. It knows nothing of Ray.

Everything that makes a client what it is comes with the task and leaves with the result, so a worker can die at any moment
and another one does the same work again, with the same bits.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sylva_ray.attacks.registry import attack_stack
from sylva_ray.attacks.transfer import transfer
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import (
    CertifyTask,
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
    ProbeTask,
    RefineOutcome,
    RefineTask,
    Split,
    TrainOutcome,
    TrainTask,
    TransferTask,
    unstack_states,
)
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.client.batches import flat_split, split_draws
from sylva_ray.federation.client.training import train_cohort
from sylva_ray.federation.contract import Algorithm, Cohort
from sylva_ray.federation.stages.layer_game.client import Phase2Client
from sylva_ray.metrics.probe import binarization_test, gradient_health
from sylva_ray.metrics.smoothing import votes
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import CohortModel, FunctionalStack, to_arrays, to_parameters
from sylva_ray.models.kernels import DTYPES
from sylva_ray.models.lora import LoraStack
from sylva_ray.transport.byzantine import attackers_of, flip_labels

EVALUATION_ROWS = 256
"""Images in one forward of an evaluation."""

FlatSplit = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""``x [N, 3, H, W]``, ``y [N]``, sorted ``owner [N]``."""

MeasureTask = EvaluateTask | TransferTask | ProbeTask | CertifyTask

COMPANION = "companion:"
"""Prefix of a companion's arrays among the weights that travel."""


def build_model(
    algorithm: Algorithm, config: ExperimentConfig, num_classes: int, weights: Mapping[str, np.ndarray] | None
) -> CohortModel:
    """The cohort model that the algorithm trains: adapters on a frozen backbone, or everything.

    ``weights`` may hold a companion's beside the backbone's own (`split_weights`)."""
    backbone = create_backbone(config.backbone, num_classes, None if weights is None else split_weights(weights)[0])
    is_full = algorithm.parameters.model == "full"
    model = FunctionalStack(backbone) if is_full else LoraStack(backbone, config.lora)
    model.kernels = config.attention_kernels
    return model


def split_weights(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The backbone's arrays, and the companion's (a teacher's), which travel under `COMPANION`."""
    own = {name: value for name, value in weights.items() if not name.startswith(COMPANION)}
    companion = {n.removeprefix(COMPANION): value for n, value in weights.items() if n.startswith(COMPANION)}
    return own, companion


class CohortWorker:
    """Runs tasks one after the other.

    Args:
        algorithm: the method; this worker attaches it to its model.
        config: resolved (no ``auto`` left in ``training`` and ``evaluation``).
        fleet: every client's data; the arrays may be shared, read-only memory.
        backbone: the timm model's state_dict as numpy arrays.
    """

    def __init__(
        self, algorithm: Algorithm, config: ExperimentConfig, fleet: FleetData, backbone: Mapping[str, np.ndarray]
    ) -> None:
        torch.set_num_threads(config.cluster.threads_per_actor)
        torch.use_deterministic_algorithms(True)
        # only a guard against reading what nobody wrote, which nothing of ours does: 199 fills a training step
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.config, self.fleet = config, fleet
        self.attackers = attackers_of(config)
        self.device = torch.device(config.training.device)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
            torch.backends.cuda.matmul.allow_tf32 = False
        model = build_model(algorithm, config, fleet.num_classes, backbone)
        assert isinstance(model, LoraStack | FunctionalStack)
        model.backbone.to(self.device)
        self.model = model
        self.algorithm = algorithm
        self.algorithm.attach(model, fleet.num_classes, split_weights(backbone)[1], self.device)

    def run(self, task: CohortTask) -> CohortResult:
        """Dispatch by the task's type."""
        self.clock = Stopwatch()
        params = to_parameters(task.states, self.device, torch.float32)
        self.model.precision = DTYPES[self.config.training.precision] if isinstance(task, TrainTask) else torch.float32
        outcomes: Sequence[Any]
        match task:
            case TrainTask():
                outcomes = self._train(task, params)
            case EvaluateTask():
                outcomes = self._evaluate(task, params)
            case TransferTask():
                outcomes = self._transfer(task, params)
            case ProbeTask():
                outcomes = self._probe(task, params)
            case CertifyTask():
                outcomes = self._certify(task, params)
            case GameTask():
                outcomes = self._game(task, params)
            case GuardTask():
                outcomes = self._guard(task, params)
            case RefineTask():
                outcomes = self._refine(task, params)
            case _:
                raise AssertionError(f"no such task: {type(task).__name__}")
        return CohortResult(task.clients, tuple(outcomes), dict(self.clock.seconds), peak_memory_bytes())

    # -- the kinds of work ---------------------------------------------------------------------------------------------

    def _train(self, task: TrainTask, params: ParameterStack) -> list[TrainOutcome]:
        data = [self._poisoned(client) for client in task.clients]
        with self.clock("train"):
            metrics = train_cohort(self._cohort(task, params), self.algorithm, params, data, task, self.config)
        states = unstack_states(to_arrays(params))
        return [
            TrainOutcome(state, len(own.train), {name: float(values[c]) for name, values in metrics.items()})
            for c, (state, own) in enumerate(zip(states, data, strict=True))
        ]

    def _evaluate(self, task: EvaluateTask, params: ParameterStack) -> list[EvaluateOutcome]:
        found = _Answers(len(task.clients))
        for first, pieces, (x, y, owner) in self._windows(task):
            with torch.no_grad():
                found.deal("predictions/benign", self.model.forward(params, x, owner).argmax(1), pieces)
            for attack in task.attacks:
                draws = split_draws(self.config.seed, attack.label, task.clients, pieces, first)
                precision = DTYPES[self.config.evaluation.precision]
                hit = attack_stack(self.model, params, x, y, owner, attack, draws.to(self.device), precision)
                found.deal(f"predictions/{attack.label}", hit.answers, pieces)
                found.deal(f"distances/{attack.label}", hit.distance, pieces)
                if task.keep:
                    found.deal(f"images/{attack.label}", hit.x_adv, pieces)
                found.count(attack.label, hit.forwards, hit.backwards)
        return found.outcomes()

    def _transfer(self, task: TransferTask, params: ParameterStack) -> list[EvaluateOutcome]:
        sources = to_parameters(task.sources, self.device, torch.float32)
        found = _Answers(len(task.clients))
        for first, pieces, (x, y, owner) in self._windows(task):
            draws = split_draws(self.config.seed, "transfer", task.clients, pieces, first).to(self.device)
            answers = transfer(self.model, sources, params, x, y, owner, task.attack, draws)
            found.deal("predictions/transfer", answers, pieces)
        return found.outcomes()

    def _probe(self, task: ProbeTask, params: ParameterStack) -> list[EvaluateOutcome]:
        found = _Answers(len(task.clients))
        for first, pieces, (x, y, owner) in self._windows(task):
            draws = split_draws(self.config.seed, "probe", task.clients, pieces, first).to(self.device)
            health = gradient_health(self.model, params, x, y, owner, task.attack, draws)
            found_planted = binarization_test(self.model, params, x, owner, task.attack, draws)
            for name, values in (health | found_planted).items():
                found.deal(f"probe/{name}", values, pieces)
        return found.outcomes()

    def _certify(self, task: CertifyTask, params: ParameterStack) -> list[EvaluateOutcome]:
        found = _Answers(len(task.clients))
        for first, pieces, (x, _, owner) in self._windows(task):
            draws = split_draws(self.config.seed, "smoothing", task.clients, pieces, first).to(self.device)
            guess, hits = votes(self.model, params, x, owner, task.sigma, task.draws, draws)
            found.deal("votes/guess", guess, pieces)
            found.deal("votes/hits", hits, pieces)
        return found.outcomes()

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

    def _windows(self, task: MeasureTask) -> Iterator[tuple[int, list[Split], FlatSplit]]:
        """Flat batches of at most `EVALUATION_ROWS` test images, some of each client's: number of the first, pieces, tensors."""
        tests = [self.fleet.client(client).test for client in task.clients]
        rows = max(1, EVALUATION_ROWS // len(tests))
        longest = max(len(test) for test in tests)
        end = longest if task.max_samples is None else min(longest, task.first + task.max_samples)
        with self.clock("evaluate"):
            for first in range(task.first, end, rows):
                window = slice(first, min(first + rows, end))
                pieces = [Split(test.images[window], test.labels[window]) for test in tests]
                yield first, pieces, flat_split(pieces, torch.float32, self.device)


class _Answers:
    """What the clients of a cohort answered so far, window by window."""

    def __init__(self, num_clients: int) -> None:
        self._parts: list[dict[str, list[np.ndarray]]] = [{} for _ in range(num_clients)]
        self._passes: dict[str, tuple[int, int]] = {}

    def deal(self, name: str, values: torch.Tensor, pieces: Sequence[Split]) -> None:
        """A flat batch's values, to the clients whose images they are."""
        borders = np.cumsum([len(piece) for piece in pieces])[:-1]
        for own, share in zip(self._parts, np.split(values.cpu().numpy(), borders), strict=True):
            own.setdefault(name, []).append(share)

    def count(self, attack: str, forwards: int, backwards: int) -> None:
        """Add to an attack's passes."""
        before = self._passes.get(attack, (0, 0))
        self._passes[attack] = (before[0] + forwards, before[1] + backwards)

    def outcomes(self) -> list[EvaluateOutcome]:
        """One per client, windows joined."""
        joined = [{name: np.concatenate(windows) for name, windows in own.items()} for own in self._parts]
        return [EvaluateOutcome(values, self._passes) for values in joined]


def peak_memory_bytes() -> int:
    """High-water mark of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

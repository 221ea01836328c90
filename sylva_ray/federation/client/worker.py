"""A worker: a resident backbone and the data, able to execute any task of any cohort. It knows nothing of Ray.

Everything that makes a client what it is comes with the task and leaves with the result, so a worker can die at any moment
and another one does the same work again, with the same bits.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import ClientData, ParameterStack, Split, StateStack
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.context import ClientContext
from sylva_ray.federation.method import Method
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import CohortModel, FunctionalStack, to_parameters
from sylva_ray.models.kernels import DTYPES, deterministic_kernels
from sylva_ray.models.lora import LoraStack
from sylva_ray.transport.byzantine import byzantine_clients, flip_labels

AUXILIARY = "auxiliary:"
"""Prefix of the auxiliary weights' names among the arrays that are sent to workers."""


def build_model(
    algorithm: Method, config: ResolvedConfig, num_classes: int, weights: Mapping[str, np.ndarray] | None
) -> CohortModel:
    """The cohort model that the algorithm trains: adapters on a frozen backbone, or everything.

    ``weights`` may hold auxiliary weights beside the backbone's (`split_weights`)."""
    backbone = create_backbone(config.backbone, num_classes, None if weights is None else split_weights(weights)[0])
    is_full = algorithm.parameters.model == "full"
    model = FunctionalStack(backbone) if is_full else LoraStack(backbone, config.lora)
    model.kernels = config.training.attention
    return model


def split_weights(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Split arrays into the backbone's and the auxiliary ones (a teacher's), whose names begin with `AUXILIARY`."""
    own = {name: value for name, value in weights.items() if not name.startswith(AUXILIARY)}
    auxiliary = {n.removeprefix(AUXILIARY): value for n, value in weights.items() if n.startswith(AUXILIARY)}
    return own, auxiliary


OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True)
class CohortResult(Generic[OutcomeT]):
    """``seconds`` is {stage: wall seconds inside the worker}, ``peak_memory_bytes`` the worker process's high-water mark."""

    clients: tuple[int, ...]
    outcomes: tuple[OutcomeT, ...]
    seconds: Mapping[str, float]
    peak_memory_bytes: int


class Task(Protocol):
    """What a worker executes: see `sylva_ray.federation.tasks.CohortTask`."""

    @property
    def clients(self) -> tuple[int, ...]:
        """Whose work it is."""
        ...

    @property
    def states(self) -> StateStack:
        """Their states, ``{name: [C, ...]}``."""
        ...

    uses_training_precision: ClassVar[bool]

    def execute(self, worker: CohortWorker, params: ParameterStack) -> Sequence[Any]:
        """One outcome per client."""
        ...


class CohortWorker:
    """Runs tasks one after the other.

    Args:
        algorithm: the method; this worker binds it to its model.
        config: the experiment.
        fleet: every client's data; the arrays may be shared, read-only memory.
        backbone: the timm model's state_dict as numpy arrays.
    """

    def __init__(
        self, algorithm: Method, config: ResolvedConfig, fleet: FleetData, backbone: Mapping[str, np.ndarray]
    ) -> None:
        torch.set_num_threads(config.cluster.threads_per_actor)
        self.config, self.fleet = config, fleet
        self.attackers = byzantine_clients(config)
        self.device = torch.device(config.training.device)
        deterministic_kernels(self.device)
        model = build_model(algorithm, config, fleet.num_classes, backbone)
        assert isinstance(model, LoraStack | FunctionalStack)
        model.backbone.to(self.device)
        self.model = model
        self.algorithm = algorithm
        self.algorithm.bind_model(model, fleet.num_classes, split_weights(backbone)[1], self.device)

    def run(self, task: Task) -> CohortResult:
        """Execute a task."""
        self.stopwatch = Stopwatch()
        params = to_parameters(task.states, self.device, torch.float32)
        self.model.precision = DTYPES[self.config.training.precision] if task.uses_training_precision else torch.float32
        outcomes = task.execute(self, params)
        return CohortResult(task.clients, tuple(outcomes), dict(self.stopwatch.seconds), peak_memory_bytes())

    # -- what tasks ask for ------------------------------------------------------------------------------------------------

    def context(self, task: Task, params: ParameterStack) -> ClientContext:
        """What a client's half may know; the state it received is ``params`` as they are now."""
        counts = np.stack([self.fleet.label_matrix()[client] for client in task.clients])
        received = {name: value.clone() for name, value in params.items()}
        return ClientContext(self.model, torch.from_numpy(counts).to(self.device), received, self.stopwatch)

    def data(self, task: Task) -> list[ClientData]:
        """The clients' images, each in its splits."""
        return [self.fleet.client(client) for client in task.clients]

    def training_data(self, client: int) -> ClientData:
        """A client's data; an attacker by label flipping trains on flipped labels."""
        data = self.fleet.client(client)
        if self.config.byzantine.attack != "label_flip" or client not in self.attackers:
            return data
        return replace(data, train=Split(data.train.images, flip_labels(data.train.labels, self.fleet.num_classes)))


def peak_memory_bytes() -> int:
    """High-water mark of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

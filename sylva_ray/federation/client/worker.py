"""A worker: a process with the backbone and the data, which executes any task of any cohort. It does not depend on Ray.

A task contains the whole state of its clients, and its result contains their new state. If a worker fails, another one
repeats the task and returns bit-identical results.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from sylva_ray.attacks.byzantine import BYZANTINE_ATTACKS, flip_labels
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import DeviceError, OutOfMemoryError, reason_of
from sylva_ray.core.failures import is_device_failure, is_out_of_memory
from sylva_ray.core.gpu import device_title
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import torch_dtype
from sylva_ray.core.timing import stopwatch_of
from sylva_ray.core.types import ClientData, ParameterStack, Split, StateStack
from sylva_ray.core.windows import WindowLimits
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.context import ClientContext
from sylva_ray.federation.method import Method
from sylva_ray.models.cohort import FunctionalStack, to_parameters
from sylva_ray.models.device_memory import enforce_share, peak_gpu_bytes
from sylva_ray.models.kernels import deterministic_kernels
from sylva_ray.transport.byzantine import byzantine_clients

if TYPE_CHECKING:
    from sylva_ray.models.backbone import Backbone
    from sylva_ray.models.lora import LoraStack

AUXILIARY = "auxiliary:"
"""Prefix of the auxiliary weights' names among the arrays that are sent to workers."""


def build_model(
    algorithm: Method, config: ResolvedConfig, num_classes: int, weights: Mapping[str, np.ndarray]
) -> LoraStack | FunctionalStack:
    """Return the cohort model that a method trains, on a backbone with given weights.

    Args:
        algorithm: the method.
        config: the experiment.
        num_classes: of the data.
        weights: of the backbone, perhaps with auxiliary ones beside them (`split_weights`).
    """
    from sylva_ray.models.backbone import create_backbone  # timm

    return cohort_model(algorithm, config, create_backbone(config.backbone, num_classes, split_weights(weights)[0]))


def cohort_model(algorithm: Method, config: ResolvedConfig, backbone: Backbone) -> LoraStack | FunctionalStack:
    """Return the cohort model that a method trains: adapters on a frozen backbone, or the whole model.

    Args:
        algorithm: the method.
        config: the experiment.
        backbone: becomes a part of the model.
    """
    from sylva_ray.models.lora import LoraStack  # timm

    is_full = algorithm.parameters.model == "full"
    model = FunctionalStack(backbone) if is_full else LoraStack(backbone, config.lora)
    model.kernels = config.training.attention
    windows = config.training.windows
    model.windows = WindowLimits(windows.model_dump(exclude={"at_once"}), windows.at_once)
    return model


def split_weights(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Split arrays into the backbone's and the auxiliary ones (a teacher's), whose names begin with `AUXILIARY`."""
    backbone = {name: value for name, value in weights.items() if not name.startswith(AUXILIARY)}
    auxiliary = {n.removeprefix(AUXILIARY): value for n, value in weights.items() if n.startswith(AUXILIARY)}
    return backbone, auxiliary


OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True)
class CohortResult(Generic[OutcomeT]):
    """What a task results in.

    Attributes:
        clients: of the task.
        outcomes: one per client.
        seconds: ``{activity: wall seconds}`` inside the worker.
        peak_memory_bytes: the highest resident memory of the worker's process so far.
        gpu: the worker's GPU, its driver and CUDA; None on a CPU.
        peak_gpu_memory_bytes: the most that its tensors used of its GPU so far; 0 on a CPU.
        windows: images in one pass, by the names of `sylva_ray.config.training.Windows`; fewer than planned where the
            memory was too small.
    """

    clients: tuple[int, ...]
    outcomes: tuple[OutcomeT, ...]
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    gpu: str | None = None
    peak_gpu_memory_bytes: int = 0
    windows: Mapping[str, int] = field(default_factory=dict)


class Task(Protocol):
    """A task as the worker sees it: see `sylva_ray.federation.tasks.CohortTask`."""

    @property
    def clients(self) -> tuple[int, ...]:
        """The C clients of the task."""
        ...

    @property
    def states(self) -> StateStack:
        """Their states, ``{name: [C, ...]}``."""
        ...

    uses_training_precision: ClassVar[bool]

    def execute(self, worker: CohortWorker, params: ParameterStack) -> Sequence[Any]:
        """Return one outcome per client."""
        ...


class CohortWorker:
    """Runs tasks one after the other.

    Args:
        algorithm: the method, which the worker binds to its model.
        config: the experiment.
        fleet: the data of all clients; the arrays may be read-only shared memory.
        backbone: the state_dict of the timm model as numpy arrays, perhaps with auxiliary weights (`split_weights`).

    Attributes:
        shared: what the running task shares with others of its batch, such as the uploads of a round; otherwise None.
    """

    def __init__(
        self, algorithm: Method, config: ResolvedConfig, fleet: FleetData, backbone: Mapping[str, np.ndarray]
    ) -> None:
        torch.set_num_threads(config.cluster.threads_per_actor)
        self.config, self.fleet = config, fleet
        self.malicious = byzantine_clients(config)
        self.device = torch.device(config.training.device)
        self.gpu = device_title(self.device)
        enforce_share(self.device, config.cluster)
        deterministic_kernels(self.device, config.training.tf32)
        model = build_model(algorithm, config, fleet.num_classes, backbone)
        model.backbone.to(self.device)
        self.model = model
        self.algorithm = algorithm
        self.shared: object = None
        self.algorithm.bind_model(model, fleet.num_classes, split_weights(backbone)[1], self.device)

    def run(self, task: Task, shared: object = None) -> CohortResult[Any]:
        """Execute a task and measure its seconds and memory.

        Args:
            task: to execute.
            shared: what it shares with other tasks; see the attribute.

        Raises:
            OutOfMemoryError: a pass does not fit the memory in windows of a single image, or something else does not;
                with the windows of another attempt.
            DeviceError: the GPU has failed.
        """
        self.shared = shared
        try:
            with naming_failures(self.model.windows):
                return self._run(task)
        finally:
            self.shared = None  # it may be as large as the uploads of a round

    def _run(self, task: Task) -> CohortResult[Any]:
        self.stopwatch = stopwatch_of(self.device)
        params = to_parameters(task.states, self.device, torch.float32)
        self.model.precision = (
            torch_dtype(self.config.training.precision) if task.uses_training_precision else torch.float32
        )
        self.model.windows.is_training = task.uses_training_precision
        self.model.windows.begin_task()
        outcomes = task.execute(self, params)
        return CohortResult(
            task.clients,
            tuple(outcomes),
            self.stopwatch.seconds,
            peak_memory_bytes(),
            self.gpu,
            peak_gpu_bytes(self.device),
            self.model.windows.fitting,
        )

    # -- what tasks need --------------------------------------------------------------------------------------------

    def context(self, task: Task, params: ParameterStack) -> ClientContext:
        """Return the context of the clients of a task; a copy of ``params`` is the state that they received."""
        counts = np.stack([self.class_counts(client) for client in task.clients])
        received = {name: value.clone() for name, value in params.items()}
        return ClientContext(self.model, torch.from_numpy(counts).to(self.device), received, self.stopwatch)

    def data(self, task: Task) -> list[ClientData]:
        """Return the data of the clients of a task."""
        return [self.fleet.client(client) for client in task.clients]

    def class_counts(self, client: int) -> np.ndarray:
        """Return how many images of each class a client trains on, ``[num_classes]``; of flipped labels if it does."""
        if self.flips_labels(client):
            return np.bincount(self.training_data(client).train.labels, minlength=self.fleet.num_classes)
        counts: np.ndarray = self.fleet.label_matrix()[client]
        return counts

    def flips_labels(self, client: int) -> bool:
        """Return whether a client is Byzantine with an attack on its labels."""
        return client in self.malicious and BYZANTINE_ATTACKS[self.config.byzantine.attack].flips_labels

    def training_data(self, client: int) -> ClientData:
        """Return the data that a client trains on: with flipped labels if its attack flips them."""
        data = self.fleet.client(client)
        if not self.flips_labels(client):
            return data
        return replace(data, train=Split(data.train.images, flip_labels(data.train.labels, self.fleet.num_classes)))


@contextmanager
def naming_failures(windows: WindowLimits | None = None) -> Iterator[None]:
    """Raise what says that memory or GPU have failed as errors of this package, which other processes can read.

    Args:
        windows: of the model that works in the ``with`` block, for another attempt; None: there is none yet.

    Raises:
        OutOfMemoryError: the memory is used up.
        DeviceError: the GPU has failed.
    """
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        if is_out_of_memory(error):
            smaller = None if windows is None else windows.smaller()
            raise OutOfMemoryError(reason, smaller) from None  # not with the frames, which keep its tensors
        if is_device_failure(error):
            raise DeviceError(reason) from None
        raise


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

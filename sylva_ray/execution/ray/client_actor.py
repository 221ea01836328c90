"""The client actor: a `CohortWorker` in a process of its own.

An actor holds the backbone and the data, which are the same for all tasks. The states of the clients are part of each
task, so an actor that fails is replaced by a new one, and its task is sent again. The module imports neither PEFT nor
MLflow, which would make every actor start more slowly and use more memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.own_code import allow
from sylva_ray.data.fleet import FleetData
from sylva_ray.execution.ray.shared_inputs import FleetReference
from sylva_ray.federation.client.worker import CohortResult, naming_failures
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.preparation.experiment import create_worker


@dataclass(frozen=True)
class Progress:
    """What a worker has done so far.

    Attributes:
        num_passes: passes through the model that it has begun.
        smaller: windows with which its task may fit, should it not fit now (`WindowLimits.smaller`).
    """

    num_passes: int
    smaller: Mapping[str, int]


class ClientActor:
    """Runs tasks one after the other; `RemoteClientActor` starts it.

    Args:
        config: the experiment.
        fleet: data of all clients. The caller passes an object reference, so that all actors of a node share one
            read-only copy; of several experiments, see `sylva_ray.execution.ray.shared_inputs`.
        backbone: arrays of the backbone, passed in the same way.
        imports: directories of the user's own code (`sylva_ray.core.own_code`).
    """

    def __init__(
        self,
        config: ResolvedConfig,
        fleet: FleetData | FleetReference,
        backbone: Mapping[str, np.ndarray],
        imports: Sequence[str] = (),
    ) -> None:
        self._inputs, self._imports = (config, fleet, backbone), imports

    @ray.method(concurrency_group="work")
    def start(self) -> tuple[str, int]:
        """Build the worker. The constructor does not, since Ray reports its errors as the loss of the actor.

        Returns:
            The id of the node, and the process id there.
        """
        allow(self._imports)
        config, fleet, backbone = self._inputs
        loaded = fleet.load() if isinstance(fleet, FleetReference) else fleet
        with naming_failures():  # the memory of an actor that this one replaces may not be free yet
            self._worker = create_worker(config, loaded, backbone)
        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    @ray.method(concurrency_group="work")
    def run(self, task: CohortTask, shared: object = None) -> CohortResult[Any]:
        """Run a task as `CohortWorker.run` does."""
        return self._worker.run(task, shared)

    @ray.method(concurrency_group="work")
    def reduce_windows(self, windows: Mapping[str, int]) -> None:
        """Let the worker hold at most so many images, ``{pass: images}``."""
        self._worker.model.windows.reduce(windows)

    @ray.method(concurrency_group="ctl")
    def progress(self) -> Progress:
        """Return what the worker has done so far, also while a task runs."""
        windows = self._worker.model.windows
        return Progress(windows.num_passes, windows.smaller())


RemoteClientActor: Any = ray.remote(  # type: ignore[call-overload]
    max_restarts=0,  # Ray would restart the process without its task; `RayPool` replaces both
    max_task_retries=0,
    concurrency_groups={"work": 1, "ctl": 1},  # all work is done by one thread, as CUDA and torch's settings need
)(ClientActor)
"""`ClientActor` as a Ray actor; its resources are set with ``.options``."""

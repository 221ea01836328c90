"""The client actor: a `CohortWorker` in a process of its own, with the frozen backbone resident.

It holds only what is expensive and the same for all. Whoever its clients are comes with each task, so a dead actor is
replaced by an empty one and the task is sent again. It imports neither PEFT nor a tracker: a process costs what it imports.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.preparation.experiment import create_worker


class ClientActor:
    """Runs tasks one after the other, as a `RemoteClientActor`.

    Args:
        config: the experiment.
        fleet: arrives as an object reference; its arrays are the node's one copy in shared memory, read-only.
        backbone: likewise.
    """

    def __init__(self, config: ResolvedConfig, fleet: FleetData, backbone: Mapping[str, np.ndarray]) -> None:
        self._inputs = config, fleet, backbone

    @ray.method(concurrency_group="work")
    def start(self) -> str:
        """Build the worker; returns the node's id. Not in the constructor, whose errors Ray reports as a death."""
        self._worker = create_worker(*self._inputs)
        return str(ray.get_runtime_context().get_node_id())

    @ray.method(concurrency_group="work")
    def run(self, task: CohortTask) -> CohortResult:
        """See `CohortWorker.run`."""
        return self._worker.run(task)

    @ray.method(concurrency_group="ctl")
    def pid(self) -> int:
        """The process id, also while a task runs."""
        return os.getpid()


RemoteClientActor: Any = ray.remote(  # type: ignore[call-overload]
    max_restarts=0,  # Ray would restart the process and lose the task; `RayPool` replaces both
    max_task_retries=0,
    concurrency_groups={"work": 1, "ctl": 1},  # one thread works (CUDA, torch's switches), one answers meanwhile
)(ClientActor)
"""`ClientActor` in a process of its own; its resources are given with ``.options``."""

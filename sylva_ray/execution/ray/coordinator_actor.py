"""The coordinator actor: runs an experiment in a process that Ray restarts after a failure.

::

    driver ── Prepared (put once) ──► Coordinator ── tasks ──► client actors
       ◄── events, summary ──────────      └── run folder: a checkpoint after every stage

It holds the lock of the run folder, because it is the process that writes there: a driver that was killed while its
coordinator still lives cannot be followed by a second coordinator. When its process fails, Ray starts another one and
calls `Coordinator.run` again, which continues from the newest checkpoint with new client actors. The data and the
backbone belong to the driver and remain in the object store.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.summary import Summary
from sylva_ray.data.fleet import FleetData
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.ray.driver_context import DriverContext
from sylva_ray.execution.ray.pool import RayPool
from sylva_ray.federation.observer import Event, EventLog
from sylva_ray.preparation.experiment import Prepared
from sylva_ray.storage.remote_copy import RemoteFolder
from sylva_ray.storage.run_folder import RunFolder

LOCK_TIMEOUT_S = 10.0
"""Seconds to wait for the process before this one, whose end Ray notices at about the time it releases the folder."""

MAX_RESTARTS = 20
"""Enough for a long run on spot machines; a coordinator that fails because of a bug ends after them."""


@dataclass(frozen=True)
class Assignment:
    """What a coordinator is to run.

    Attributes:
        config: the experiment.
        num_actors: number of client actors.
        setup_seconds: see `Prepared`.
        changed_inputs: see `Prepared`. A restarted coordinator gets the same data and weights from the object store.
        notices: see `Prepared`.
        fleet: reference to the data that the driver has put. Ray passes references inside a dataclass on as references.
        backbone: reference to the arrays of the backbone.
        folder: of the run, with an absolute path.
        remote_url: the URL that gets a copy of the folder after every stage; None: no copy.
        driver: the driver, on the coordinator's own node.
    """

    config: ResolvedConfig
    num_actors: int
    setup_seconds: float
    changed_inputs: tuple[str, ...]
    notices: tuple[str, ...]
    fleet: ray.ObjectRef[FleetData]
    backbone: ray.ObjectRef[dict[str, np.ndarray]]
    folder: RunFolder
    remote_url: str | None
    driver: DriverContext


class Coordinator:
    """Runs one experiment; `RemoteCoordinator` starts it.

    Every method may be called again after a restart. None may use CUDA: an actor without GPUs of its own can see all of
    them.
    """

    def __init__(self) -> None:
        self._process_key = uuid.uuid4().hex
        self._log = EventLog()

    @ray.method(concurrency_group="work")
    def run(self, assignment: Assignment) -> Summary:
        """Run the experiment, or continue it from its newest checkpoint.

        Returns:
            The summary, as in ``summary.json``.
        """
        assignment.driver.enter()
        config, fleet, backbone = assignment.config, assignment.fleet, assignment.backbone
        arrays = ray.get(backbone)
        prepared = Prepared(
            config,
            ray.get(fleet),
            arrays,
            assignment.setup_seconds,
            assignment.changed_inputs,
            notices=assignment.notices,
        )
        remote = RemoteFolder(assignment.remote_url, assignment.folder.path) if assignment.remote_url else None
        with assignment.folder.locked(assignment.driver.process, LOCK_TIMEOUT_S):
            pool = RayPool(config, fleet, backbone, assignment.num_actors, self._log)
            try:
                return run_experiment(prepared, assignment.folder, pool, self._log, remote)
            finally:
                pool.close()

    @ray.method(concurrency_group="ctl")
    def events(self, process_key: str, first: int) -> tuple[str, int, list[Event]]:
        """Return new events.

        Args:
            process_key: what this method returned before; empty at first. After a restart it no longer fits.
            first: number of the first event to return; 0 is used where ``process_key`` does not fit.

        Returns:
            The key of this process, its id, and the events.
        """
        new = self._log.events[first if process_key == self._process_key else 0 :]
        return self._process_key, os.getpid(), new

    @ray.method(concurrency_group="ctl")
    def pid(self) -> int:
        """Return the process id, also while the experiment runs."""
        return os.getpid()


RemoteCoordinator: Any = ray.remote(  # type: ignore[call-overload]
    num_cpus=0,  # it mostly waits for its client actors
    max_restarts=MAX_RESTARTS,
    max_task_retries=-1,
    concurrency_groups={"work": 1, "ctl": 1},
)(Coordinator)
"""`Coordinator` as a Ray actor; its name and node are set with ``.options``."""

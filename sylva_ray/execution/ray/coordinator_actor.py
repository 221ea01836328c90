"""The coordinator actor: the numbered loop of `sylva_ray.preparation.experiment.run_experiment`, in a process that may die.

    driver ── Prepared (put once) ──► Coordinator ── tasks ──► client actors
       ◄── events, summary ──────────      └── run folder: a checkpoint after every step

It is unblocked by its pool alone. When its process dies, Ray starts another one and calls `run` again, which goes on from the
newest checkpoint; the client actors die with it and are made anew. The objects it was given belong to the driver and stay.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.summary import Summary
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.ray.pool import RayPool
from sylva_ray.federation.observer import Event, EventLog
from sylva_ray.preparation.experiment import Prepared
from sylva_ray.storage.remote_copy import RemoteFolder
from sylva_ray.storage.run_folder import RunFolder

MAX_RESTARTS = 20
"""Enough for a long run on machines that come and go; a coordinator that dies of its own work must end some time."""


@dataclass(frozen=True)
class Assignment:
    """What a coordinator is to do.

    Attributes:
        config: the experiment.
        num_actors: client actors to keep.
        setup_seconds: see `Prepared`.
        fleet, backbone: references to what the driver has put. Inside a dataclass they stay references.
        run_dir: absolute.
        remote_url: where a copy of it goes after every step; None: nowhere.
        working_dir: the driver's; relative paths in the config start there.
        environment: the driver's settings for the tracker and the storage.
    """

    config: ResolvedConfig
    num_actors: int
    setup_seconds: float
    fleet: ray.ObjectRef
    backbone: ray.ObjectRef
    run_dir: Path
    remote_url: str | None
    working_dir: Path
    environment: Mapping[str, str]


class Coordinator:
    """Runs one experiment, as a `RemoteCoordinator`.

    Every method may be called again after a restart. It must not touch CUDA: an actor without GPUs of its own sees them all.
    """

    def __init__(self) -> None:
        self._life = uuid.uuid4().hex
        self._log = EventLog()

    @ray.method(concurrency_group="work")
    def run(self, given: Assignment) -> Summary:
        """Run the experiment, or go on with it, and return its summary."""
        os.chdir(given.working_dir)
        os.environ.update(given.environment)
        prepared = Prepared(given.config, ray.get(given.fleet), ray.get(given.backbone), given.setup_seconds)
        pool = RayPool(given.config, given.fleet, given.backbone, given.num_actors, self._log)
        remote = RemoteFolder(given.remote_url, given.run_dir) if given.remote_url else None
        try:
            return run_experiment(prepared, RunFolder(given.run_dir), pool, self._log, remote)
        finally:
            pool.close()

    @ray.method(concurrency_group="ctl")
    def events(self, life: str, since: int) -> tuple[str, list[Event]]:
        """This process's name, and its events from number ``since`` on; from 0 on if the caller knew another process."""
        return self._life, self._log.events[since if life == self._life else 0 :]

    @ray.method(concurrency_group="ctl")
    def pid(self) -> int:
        """The process id, also while the experiment runs."""
        return os.getpid()


RemoteCoordinator: Any = ray.remote(  # type: ignore[call-overload]
    num_cpus=0,  # it waits for its actors most of the time
    max_restarts=MAX_RESTARTS,
    max_task_retries=-1,
    concurrency_groups={"work": 1, "ctl": 1},
)(Coordinator)
"""`Coordinator` in a process of its own; its name and place are given with ``.options``."""

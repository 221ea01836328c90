"""`ClientPool` on Ray: a queue of tasks, and actors that take the next one as soon as they are free.

::

    tasks, longest first ──► [queue] ──► free actor ──► result (copied out of the object store)
                                ▲            │
                                └── lost ◄───┘  a new actor replaces it, the task goes to the front

`RayPool.run` waits until an actor answers, is lost or has started, or until the deadline. Any actor can run any task,
and every random number depends on its purpose alone: results are bit-identical for any number of actors and after
failures.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import RunError
from sylva_ray.core.own_code import allowed_directories
from sylva_ray.data.fleet import FleetData
from sylva_ray.execution.ray.client_actor import RemoteClientActor
from sylva_ray.execution.ray.session import cluster_gpus, live_nodes
from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.observer import Notice, Observer
from sylva_ray.federation.pool import OnDone
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.provisioning.placement import gpu_bundles

STATUS_INTERVAL_S = 15.0
"""Seconds between two notices while no actor has started: a cloud node needs minutes, an actor ten seconds."""

MAX_NODE_LOSSES = 20
"""How often a task, or the start of an actor, may lose its node before the run ends; spot machines are often lost."""


@dataclass
class _Slot:
    """An actor of the pool.

    Attributes:
        actor: the handle.
        pending: what it is busy with, its start or the task ``job``; None: it is free.
        node: id of its node; None: it has not started yet.
        job: number of its task; None: it has none.
    """

    actor: ActorHandle[Any]
    pending: ray.ObjectRef[Any] | None
    node: str | None = None
    job: int | None = None

    @property
    def has_started(self) -> bool:
        """Whether the actor takes tasks."""
        return self.node is not None


class _Batch:
    """The tasks of one `RayPool.run` and what has become of them.

    Args:
        tasks: in the order in which they are started.
        on_done: see `ClientPool.run`.

    Attributes:
        queue: numbers of the tasks that wait for an actor.
        results: of the tasks; None: not finished.
        unfinished: number of tasks without a result.
        process_losses: how often each task lost its actor's process.
        node_losses: how often each task lost its actor's node.
    """

    def __init__(self, tasks: Sequence[CohortTask], on_done: OnDone | None) -> None:
        self.tasks, self.on_done = tasks, on_done
        self.queue = deque(range(len(tasks)))
        self.results: list[CohortResult[Any] | None] = [None] * len(tasks)
        self.unfinished = len(tasks)
        self.process_losses: Counter[int] = Counter()
        self.node_losses: Counter[int] = Counter()

    def finish(self, job: int, result: CohortResult[Any]) -> None:
        self.results[job] = result
        self.unfinished -= 1
        if self.on_done is not None:
            self.on_done(self.tasks[job], result)


class RayPool:
    """Client actors on the Ray cluster that this process is connected to.

    Args:
        config: the experiment.
        fleet: reference to the data of all clients, put once for all actors.
        backbone: reference to the arrays of the backbone, likewise.
        num_actors: number of actors.
        observer: gets a notice when an actor was lost and its task runs again, and every `STATUS_INTERVAL_S` seconds
            while no actor has started.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        fleet: ray.ObjectRef[FleetData],
        backbone: ray.ObjectRef[dict[str, np.ndarray]],
        num_actors: int,
        observer: Observer,
    ) -> None:
        self.num_actors = num_actors
        self._section, self._observer = config.cluster, observer
        self._arguments = (config, fleet, backbone, allowed_directories())
        # a trial of a sweep has a placement group: a bundle for the coordinator, then one for every actor
        group = ray.util.get_current_placement_group()
        self._trial_group = group if group is not None and group.bundle_count > num_actors else None
        bundles = [] if self._trial_group else gpu_bundles(config.cluster, num_actors, int(cluster_gpus()))
        # a group for each: a bundle that has to wait for a node from an autoscaler does not delay the others
        self._groups = [placement_group([bundle]) for bundle in bundles]
        self._failed_starts: Counter[tuple[int, bool]] = Counter()  # {(slot, whether its node was lost): times}
        self._slots: list[_Slot | None] = [self._start(index) for index in range(num_actors)]

    def run(
        self, tasks: Sequence[CohortTask], deadline_s: float | None = None, on_done: OnDone | None = None
    ) -> list[CohortResult[Any] | None]:
        """Run tasks as `ClientPool.run` does. The deadline counts from when an actor has started."""
        batch = _Batch(tasks, on_done)
        self._slots = [slot or self._start(index) for index, slot in enumerate(self._slots)]
        deadline, last_started = math.inf, time.monotonic()
        try:
            while batch.unfinished:
                any_started = any(slot.has_started for slot in self._occupied())
                if any_started:
                    last_started = time.monotonic()
                if deadline_s is not None and deadline == math.inf and any_started:
                    deadline = time.monotonic() + deadline_s
                self._dispatch(batch)
                answered = self._wait(min(deadline - time.monotonic(), math.inf if any_started else STATUS_INTERVAL_S))
                if answered is not None:
                    self._collect(answered, batch)
                elif time.monotonic() >= deadline:
                    self._abandon_running(restart=True)
                    break
                else:
                    self._report_waiting(time.monotonic() - last_started)
        except BaseException:
            self._abandon_running(restart=False)
            raise
        return batch.results

    def close(self) -> None:
        """Stop the actors and release the GPUs."""
        for index in range(len(self._slots)):
            self._stop_actor(index)
        while self._groups:
            remove_placement_group(self._groups.pop())

    # -- steps of the loop ---------------------------------------------------------------------------------------------

    def _dispatch(self, batch: _Batch) -> None:
        """Give the next tasks to the free actors. Tasks are put here, so that the store holds only those that run."""
        for slot in self._occupied():
            if batch.queue and slot.has_started and slot.pending is None:
                slot.job = batch.queue.popleft()
                slot.pending = slot.actor.run.remote(ray.put(batch.tasks[slot.job]))

    def _wait(self, timeout_s: float) -> int | None:
        """Return a slot whose pending work has ended, successfully or not; None after ``timeout_s`` seconds."""
        pending = {slot.pending: index for index, slot in enumerate(self._slots) if slot and slot.pending is not None}
        timeout = None if timeout_s == math.inf else max(0.0, timeout_s)
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=timeout)
        return pending[ready[0]] if ready else None

    def _collect(self, index: int, batch: _Batch) -> None:
        """Handle what a slot's pending work ended with: a result, the start of the actor, an exception, or a loss."""
        slot = self._slots[index]
        assert slot is not None
        assert slot.pending is not None
        job, pending = slot.job, slot.pending
        where = "starting a client actor" if job is None else batch.tasks[job].where
        try:
            answer = ray.get(pending)
        except RayTaskError as error:
            slot.pending = slot.job = None
            raise RunError(f"{where}: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:  # the actor, its node or its result is lost
            self._replace(index, where, batch, error)
            return
        slot.pending = slot.job = None
        if job is None:
            slot.node = answer
            self._failed_starts.pop((index, False), None)
            self._failed_starts.pop((index, True), None)
        else:
            # Ray's arrays are read-only views, which would keep the result in the object store
            batch.finish(job, copy.deepcopy(answer))

    def _replace(self, index: int, where: str, batch: _Batch, error: RayError) -> None:
        """Start a new actor in a slot whose actor was lost; its task, if it had one, goes to the front of the queue.

        Raises:
            RunError: the same task, or the start of this actor, failed too often.
        """
        slot = self._slots[index]
        assert slot is not None
        self._stop_actor(index)
        with_node = _lost_with_its_node(slot, error)
        num_losses = self._count_loss(index, slot.job, with_node, batch)
        max_losses = MAX_NODE_LOSSES if with_node else self._section.max_task_retries
        is_hopeless = isinstance(error, RayActorError) and error.actor_init_failed
        if num_losses > max_losses or is_hopeless:
            reason = str(error).strip().splitlines()[-1]
            raise RunError(f"{where}: the client actor was lost {num_losses} time(s), the last time: {reason}")
        if slot.job is not None:
            batch.queue.appendleft(slot.job)
            self._observer.on_notice(Notice(f"a worker was lost during {where}; its clients run again elsewhere"))
        self._slots[index] = self._start(index)

    def _count_loss(self, index: int, job: int | None, with_node: bool, batch: _Batch) -> int:
        """Count the loss of an actor, for its task or else for its start, and return how often that happened."""
        if job is None:
            self._failed_starts[index, with_node] += 1
            return self._failed_starts[index, with_node]
        losses = batch.node_losses if with_node else batch.process_losses
        losses[job] += 1
        return losses[job]

    def _report_waiting(self, waited_s: float) -> None:
        """Notify the observer that no actor has started.

        Raises:
            RunError: that has lasted for ``cluster.startup_timeout_s``.
        """
        section, num_actors = self._section, self.num_actors
        request = f"{section.cpus_per_actor:g} CPUs and {section.gpus_per_actor:g} GPUs"
        if waited_s >= section.startup_timeout_s:
            reason = f"the cluster had no room for {request} (see `ray status`)"
            raise RunError(f"no client actor started within {section.startup_timeout_s:g} s: {reason}")
        nodes = len(live_nodes())
        present = f"the cluster has {nodes} node{'s' * (nodes != 1)} and {cluster_gpus():g} GPUs"
        text = f"waiting for the first of {num_actors} actors ({request} each) for {waited_s:.0f} s; {present}"
        self._observer.on_notice(Notice(text))

    # -- slots ---------------------------------------------------------------------------------------------------------

    def _occupied(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot is not None]

    def _start(self, index: int) -> _Slot:
        section = self._section
        strategy: PlacementGroupSchedulingStrategy | None = None
        if self._trial_group:
            strategy = PlacementGroupSchedulingStrategy(self._trial_group, 1 + index)
        elif self._groups:
            strategy = PlacementGroupSchedulingStrategy(self._groups[index % len(self._groups)])
        resources = {"num_cpus": section.cpus_per_actor, "num_gpus": section.gpus_per_actor}
        actor = RemoteClientActor.options(**resources, scheduling_strategy=strategy).remote(*self._arguments)
        return _Slot(actor, actor.start.remote())

    def _stop_actor(self, index: int) -> None:
        slot = self._slots[index]
        self._slots[index] = None
        if slot is not None:
            ray.kill(slot.actor)

    def _abandon_running(self, restart: bool) -> None:
        """Stop the actors that run a task, which Ray cannot cancel, and with ``restart`` start new ones."""
        for index, slot in enumerate(self._slots):
            if slot is not None and slot.job is not None:
                self._stop_actor(index)
                self._slots[index] = self._start(index) if restart else None


def _lost_with_its_node(slot: _Slot, error: RayError) -> bool:
    """Return whether a machine was lost, not only a process. Ray notices the connection seconds before the node."""
    if isinstance(error, ActorUnavailableError | NodeDiedError):
        return True
    if isinstance(error, RayActorError) and error.preempted:
        return True
    return slot.node is not None and slot.node not in {node["NodeID"] for node in live_nodes()}

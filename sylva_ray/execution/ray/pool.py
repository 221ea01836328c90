"""`ClientPool` on Ray: a queue of tasks, and actors that take the next one as soon as they are free.

::

    tasks, longest first ──► [queue] ──► free actor ──► result (copied out of the object store)
                                ▲            │
                                └── lost ◄───┘  a new actor replaces it, the task goes to the front

`RayPool.run` waits until an actor answers, is lost or has started, or until the deadline. An actor that hangs is lost,
too: one whose process does not answer (it was stopped, or its machine is out of memory), whose task takes much longer
than others of its kind did, or whose task begins no pass through the model for an hour. Any actor can run any task, and
every random number depends on its purpose alone: results are bit-identical for any number of actors and after failures.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.config.tracking import TrackingSection
from sylva_ray.core.errors import DeviceError, OutOfMemoryError, RunError
from sylva_ray.core.own_code import allowed_directories
from sylva_ray.data.fleet import FleetData
from sylva_ray.execution.ray.client_actor import RemoteClientActor
from sylva_ray.execution.ray.session import cluster_gpus, live_nodes, node_resources, possible_nodes
from sylva_ray.execution.ray.shared_inputs import FleetReference
from sylva_ray.execution.ray.slots import Loss, Slot
from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.observer import Notice, Observer
from sylva_ray.federation.pool import WHAT_WOULD_FIT, OnDone
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.provisioning.placement import gpu_bundles

CHECK_INTERVAL_S = 5.0
"""Seconds between two questions whether busy actors are alive."""

MIN_TASK_SECONDS, TASK_PATIENCE = 600.0, 30
"""A task may take so many seconds, or so many times what the slowest earlier task of its kind took."""

MAX_IDLE_S = 3600.0
"""Seconds that a task may go without a pass through the model: before the first one CUDA starts and kernels compile."""

STATUS_INTERVAL_S = 15.0
"""Seconds between two notices while no actor has started: a cloud node needs minutes, an actor ten seconds."""

MAX_NODE_LOSSES = 20
"""How often a task, or the start of an actor, may lose its node before the run ends; spot machines are often lost."""


class _Batch:
    """The tasks of one `RayPool.run` and what has become of them.

    Args:
        tasks: in the order in which they are started.
        on_done: see `ClientPool.run`.
        shared: reference to what all tasks need; None: nothing.

    Attributes:
        queue: numbers of the tasks that wait for an actor.
        results: of the tasks; None: not finished.
        unfinished: number of tasks without a result.
        process_losses: how often each task lost its actor's process.
        node_losses: how often each task lost its actor's node.
    """

    def __init__(
        self, tasks: Sequence[CohortTask], on_done: OnDone | None, shared: ray.ObjectRef[object] | None
    ) -> None:
        self.tasks, self.on_done, self.shared = tasks, on_done, shared
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
        fleet: ray.ObjectRef[FleetData] | ray.ObjectRef[FleetReference],
        backbone: ray.ObjectRef[dict[str, np.ndarray]],
        num_actors: int,
        observer: Observer,
    ) -> None:
        self.num_actors = num_actors
        self._section, self._observer = config.cluster, observer
        config = config.model_copy(update={"tracking": TrackingSection()})  # clients send nothing to the store
        self._arguments = (config, fleet, backbone, allowed_directories())
        # a trial of a sweep has a placement group: a bundle for the coordinator, then one for every actor
        group = ray.util.get_current_placement_group()
        self._trial_group = group if group is not None and group.bundle_count > num_actors else None
        bundles: list[dict[str, float]] = []
        if config.cluster.gpus_per_actor > 0 and not self._trial_group:
            bundles = gpu_bundles(config.cluster, num_actors, node_resources(), possible_nodes(config.cluster))
        # a group for each: a bundle that has to wait for a node from an autoscaler does not delay the others
        self._groups = [placement_group([bundle]) for bundle in bundles]
        self._failed_starts: Counter[tuple[int, bool]] = Counter()  # {(slot, whether its node was lost): times}
        self._slowest: dict[type[CohortTask], float] = {}  # seconds per epoch of the slowest task of each kind
        self._slots: list[Slot | None] = [self._start(index) for index in range(num_actors)]

    def run(
        self,
        tasks: Sequence[CohortTask],
        deadline_s: float | None = None,
        on_done: OnDone | None = None,
        shared: object = None,
    ) -> list[CohortResult[Any] | None]:
        """Run tasks as `ClientPool.run` does. The deadline counts from when an actor has started."""
        batch = _Batch(tasks, on_done, None if shared is None else ray.put(shared))
        self._slots = [slot or self._start(index) for index, slot in enumerate(self._slots)]
        deadline, last_started, last_checked = math.inf, time.monotonic(), time.monotonic()
        try:
            while batch.unfinished:
                any_started = any(slot.has_started for slot in self._occupied())
                if any_started:
                    last_started = time.monotonic()
                if deadline_s is not None and deadline == math.inf and any_started:
                    deadline = time.monotonic() + deadline_s
                if time.monotonic() < deadline:
                    self._dispatch(batch)
                interval = CHECK_INTERVAL_S if any_started else STATUS_INTERVAL_S
                answered = self._wait(min(deadline - time.monotonic(), interval))
                if answered is not None:
                    self._collect(answered, batch)
                elif time.monotonic() >= deadline:
                    self._abandon_running(restart=True)
                    break
                elif not any_started:
                    self._report_waiting(time.monotonic() - last_started)
                if any_started and time.monotonic() - last_checked >= CHECK_INTERVAL_S:
                    self._replace_hung(batch)
                    last_checked = time.monotonic()
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
                job = batch.queue.popleft()
                slot.give(job, slot.actor.run.remote(ray.put(batch.tasks[job]), batch.shared), time.monotonic())

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
            if isinstance(error.cause, OutOfMemoryError | DeviceError):
                self._replace(index, where, batch, Loss.from_cause(error.cause))
                return
            slot.pending = slot.job = None
            raise RunError(f"{where}: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:  # the actor, its node or its result is lost
            self._replace(index, where, batch, Loss.from_error(slot, error))
            return
        slot.pending = slot.job = None
        if job is None:
            slot.node, slot.process = answer
            self._failed_starts.pop((index, False), None)
            self._failed_starts.pop((index, True), None)
        else:
            # Ray's arrays are read-only views, which would keep the result in the object store
            batch.finish(job, copy.deepcopy(answer))
            task = batch.tasks[job]
            seconds = (time.monotonic() - slot.busy_since) / task.num_epochs
            self._slowest[type(task)] = max(seconds, self._slowest.get(type(task), 0.0))

    def _replace_hung(self, batch: _Batch) -> None:
        """Ask the busy actors for a sign of life, and replace those that hang.

        Raises:
            RunError: as `_replace`.
        """
        now = time.monotonic()
        for index, slot in enumerate(self._slots):
            if slot is None or slot.job is None:
                continue
            slot.listen(now)
            task = batch.tasks[slot.job]
            reason = self._hang_of(slot, task, now)
            if reason is not None:
                slot.kill_process()
                self._replace(index, task.where, batch, Loss(reason))

    def _hang_of(self, slot: Slot, task: CohortTask, now: float) -> str | None:
        """Return in words why an actor that has a task counts as hung; None: it does not."""
        if slot.silent_s(now) > self._section.hang_timeout_s:
            return f"its process gave no sign of life for {slot.silent_s(now):.0f} s"
        if now - slot.busy_since > self._task_deadline_s(task):
            return f"its task took longer than {self._task_deadline_s(task):g} s (cluster.task_deadline_s)"
        if self._section.task_deadline_s is None and slot.idle_s > MAX_IDLE_S:
            return f"its task computed nothing for {slot.idle_s:.0f} s; cluster.task_deadline_s would give it longer"
        return None

    def _task_deadline_s(self, task: CohortTask) -> float:
        """Return how long a task may take as long as it computes; without a setting or a pace of its kind, for ever."""
        if self._section.task_deadline_s is not None:
            return self._section.task_deadline_s
        slowest = self._slowest.get(type(task))
        return math.inf if slowest is None else max(MIN_TASK_SECONDS, TASK_PATIENCE * slowest * task.num_epochs)

    def _replace(self, index: int, where: str, batch: _Batch, loss: Loss) -> None:
        """Start a new actor in a slot whose actor was lost; its task, if it had one, goes to the front of the queue.

        Raises:
            RunError: the same task, or the start of this actor, failed too often.
        """
        slot = self._slots[index]
        assert slot is not None
        self._stop_actor(index)
        needs_smaller = loss.by_memory and slot.job is not None  # windows play no part in the start of an actor
        if needs_smaller:
            self._shrink_windows(slot, where, loss)
        num_losses = 0 if needs_smaller else self._count_loss(index, slot.job, loss.with_node, batch)
        max_losses = MAX_NODE_LOSSES if loss.with_node else self._section.max_task_retries
        if num_losses > max_losses or loss.is_hopeless:
            raise RunError(f"{where}: the client actor was lost {num_losses} time(s), the last time: {loss.reason}")
        is_last_try = slot.job is not None and num_losses == max_losses > 1  # a single loss may be chance
        if is_last_try and loss.is_unexplained and self._limit_windows(self._smaller_windows(slot, loss)):
            self._observer.on_notice(Notice(f"{where} may not fit the memory; its last try has smaller windows"))
        if slot.job is not None:
            batch.queue.appendleft(slot.job)
            self._observer.on_notice(Notice(f"a worker was lost during {where}; its clients run again elsewhere"))
        self._slots[index] = self._start(index)

    def _shrink_windows(self, slot: Slot, where: str, loss: Loss) -> None:
        """Give the actors that are started from now on windows of half the images with which this one was lost.

        Where these are not known, because a process was killed before it told, the planned windows are halved.

        Raises:
            RunError: the windows cannot be smaller.
        """
        is_planned = slot.windows == self._arguments[0].training.windows
        if self._limit_windows(self._smaller_windows(slot, loss)):
            self._observer.on_notice(Notice(f"{where} did not fit the memory; a new worker has smaller windows"))
        elif is_planned:
            raise RunError(f"{where}: {loss.reason}; {WHAT_WOULD_FIT}")

    def _smaller_windows(self, slot: Slot, loss: Loss) -> Mapping[str, int]:
        """Return the windows that a loss names, else half of the planned ones, unless they became smaller since."""
        planned = self._arguments[0].training.windows
        if loss.windows is not None:
            return loss.windows
        if slot.windows != planned:  # because of another actor
            return {}
        return {name: max(1, size // 2) for name, size in planned.model_dump(exclude={"at_once"}).items()}

    def reduce_windows(self, windows: Mapping[str, int]) -> None:
        """Let all actors hold at most so many images, ``{pass: images}``, and those that are started later."""
        if not self._limit_windows(windows):
            return
        for slot in self._occupied():
            slot.windows = self._arguments[0].training.windows
            slot.actor.reduce_windows.remote(dict(windows))

    def _limit_windows(self, windows: Mapping[str, int]) -> bool:
        """Limit the windows of the actors that are started from now on, and return whether any was larger."""
        config, fleet, backbone, imports = self._arguments
        planned = config.training.windows
        limited = planned.model_copy(
            update={name: min(size, int(getattr(planned, name))) for name, size in windows.items()}
        )
        training = config.training.model_copy(update={"windows": limited})
        self._arguments = config.model_copy(update={"training": training}), fleet, backbone, imports
        return limited != planned

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
        gpus = f" and {section.gpus_per_actor:g} GPUs" if section.gpus_per_actor else ""
        request = f"{section.cpus_per_actor:g} CPUs{gpus}"
        if waited_s >= section.startup_timeout_s:
            reason = f"the cluster had no room for {request} (see `ray status`)"
            raise RunError(f"no client actor started within {section.startup_timeout_s:g} s: {reason}")
        nodes = len(live_nodes())
        has_gpus = f" and {cluster_gpus():g} GPUs" if gpus else ""
        present = f"the cluster has {nodes} node{'s' * (nodes != 1)}{has_gpus}"
        text = f"waiting for the first of {num_actors} actors ({request} each) for {waited_s:.0f} s; {present}"
        self._observer.on_notice(Notice(text))

    # -- slots ---------------------------------------------------------------------------------------------------------

    def _occupied(self) -> list[Slot]:
        return [slot for slot in self._slots if slot is not None]

    def _start(self, index: int) -> Slot:
        section = self._section
        strategy: PlacementGroupSchedulingStrategy | None = None
        if self._trial_group:
            strategy = PlacementGroupSchedulingStrategy(self._trial_group, 1 + index)
        elif self._groups:
            strategy = PlacementGroupSchedulingStrategy(self._groups[index % len(self._groups)])
        resources = {"num_cpus": section.cpus_per_actor, "num_gpus": section.gpus_per_actor}
        actor = RemoteClientActor.options(**resources, scheduling_strategy=strategy).remote(*self._arguments)
        return Slot(actor, actor.start.remote(), self._arguments[0].training.windows)

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

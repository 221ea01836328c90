"""`ClientPool` on Ray: a queue of tasks, and actors that take the next one when they are free.

    tasks, longest first ──► [queue] ──► free actor ──► result (copied out of the object store)
                                ▲            │
                                └── died ◄───┘  a new actor takes its place, the task goes to the front

Per `run` it produces one result per task; it waits for the first actor that answers; it is unblocked by a result, a death, an
actor that came up, or the deadline. Any actor can run any task and every random draw is named by what it is for, so the
results depend neither on how many actors there are nor on who died.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import RunError
from sylva_ray.execution.ray.client_actor import RemoteClientActor
from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.observer import Notice, Observer
from sylva_ray.federation.pool import OnDone
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.provisioning.placement import gpu_bundles

STATUS_INTERVAL_S = 15.0
"""While not a single actor is up, how often to say so: a cloud node needs minutes, an actor's imports ten seconds."""

MAX_NODE_LOSSES = 20
"""How often one cohort, or the start of one actor, may lose its node (a spot machine is nobody's fault) before the run ends."""


@dataclass
class _Slot:
    """One of the pool's places and the actor in it. ``pending`` is what it is busy with: its start, or the task ``job``.

    ``node`` is the id of the node where it came up; None: it did not yet."""

    actor: ActorHandle
    pending: ray.ObjectRef | None
    node: str | None = None
    job: int | None = None

    @property
    def is_up(self) -> bool:
        """Whether it takes tasks."""
        return self.node is not None


class _Batch:
    """Bookkeeping of one `RayPool.run`."""

    def __init__(self, tasks: Sequence[CohortTask], on_done: OnDone | None) -> None:
        self.tasks, self.on_done = tasks, on_done
        self.queue = deque(range(len(tasks)))
        self.results: list[CohortResult | None] = [None] * len(tasks)
        self.unfinished = len(tasks)
        self.deaths: Counter[int] = Counter()
        self.node_losses: Counter[int] = Counter()

    def finish(self, job: int, result: CohortResult) -> None:
        self.results[job] = result
        self.unfinished -= 1
        if self.on_done is not None:
            self.on_done(self.tasks[job], result)


class RayPool:
    """Client actors on the Ray cluster that this process is connected to.

    Args:
        config: the experiment.
        fleet: reference to the `FleetData`, put once for all actors.
        backbone: reference to the backbone's arrays, likewise.
        num_actors: how many to keep.
        observer: gets a notice when an actor was lost and its task runs again, and every `STATUS_INTERVAL_S` seconds while
            no actor is up.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        fleet: ray.ObjectRef,
        backbone: ray.ObjectRef,
        num_actors: int,
        observer: Observer,
    ) -> None:
        self.num_actors = num_actors
        self._section, self._observer = config.cluster, observer
        self._arguments = (config, fleet, backbone)
        num_gpus = int(ray.cluster_resources().get("GPU", 0.0))
        # inside a trial of a sweep: its own group, where a bundle for every actor follows the coordinator's
        group = ray.util.get_current_placement_group()
        self._trial = group if group is not None and group.bundle_count > num_actors else None
        wanted = [] if self._trial else gpu_bundles(config.cluster, num_actors, num_gpus)
        # a group each: one that finds no room yet (an autoscaler may bring it) does not hold up the others
        self._groups = [placement_group([bundle]) for bundle in wanted]
        self._failed_starts: Counter[tuple[int, bool]] = Counter()  # by slot, and whether its node went with it
        self._slots: list[_Slot | None] = [self._start(index) for index in range(num_actors)]

    def run(
        self, tasks: Sequence[CohortTask], deadline_s: float | None = None, on_done: OnDone | None = None
    ) -> list[CohortResult | None]:
        """See `ClientPool.run`. The deadline's clock starts when an actor is up: a slow start costs no client its round."""
        batch = _Batch(tasks, on_done)
        self._slots = [slot or self._start(index) for index, slot in enumerate(self._slots)]
        deadline, last_up = math.inf, time.monotonic()
        try:
            while batch.unfinished:
                any_up = any(slot.is_up for slot in self._occupied())
                if any_up:
                    last_up = time.monotonic()
                if deadline_s is not None and deadline == math.inf and any_up:
                    deadline = time.monotonic() + deadline_s
                self._dispatch(batch)
                arrived = self._wait(min(deadline - time.monotonic(), math.inf if any_up else STATUS_INTERVAL_S))
                if arrived is not None:
                    self._collect(arrived, batch)
                elif time.monotonic() >= deadline:
                    self._abandon_running(restart=True)
                    break
                else:
                    self._report_waiting(time.monotonic() - last_up)
        except BaseException:
            self._abandon_running(restart=False)
            raise
        return batch.results

    def close(self) -> None:
        """Kill the actors and give the GPUs back."""
        for index in range(len(self._slots)):
            self._stop_actor(index)
        while self._groups:
            remove_placement_group(self._groups.pop())

    # -- one turn of the loop ------------------------------------------------------------------------------------------

    def _dispatch(self, batch: _Batch) -> None:
        """Every free actor gets the next task. The put is here and not earlier, so the store holds only what is running."""
        for slot in self._occupied():
            if batch.queue and slot.is_up and slot.pending is None:
                slot.job = batch.queue.popleft()
                slot.pending = slot.actor.run.remote(ray.put(batch.tasks[slot.job]))

    def _wait(self, timeout_s: float) -> int | None:
        """Index of a slot whose pending work has ended, well or not; None after ``timeout_s`` seconds."""
        pending = {slot.pending: index for index, slot in enumerate(self._slots) if slot and slot.pending is not None}
        timeout = None if timeout_s == math.inf else max(0.0, timeout_s)
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=timeout)
        return pending[ready[0]] if ready else None

    def _collect(self, index: int, batch: _Batch) -> None:
        """Take what has arrived at a slot: a result, an actor that is up, an exception, or a death."""
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
            batch.finish(
                job, copy.deepcopy(answer)
            )  # Ray's arrays are read-only and pin the store as long as we keep them

    def _replace(self, index: int, where: str, batch: _Batch, error: RayError) -> None:
        """A new actor for a slot whose actor was lost; its task, if it had one, goes to the front of the queue."""
        slot = self._slots[index]
        assert slot is not None
        self._stop_actor(index)
        reason = str(error).strip().splitlines()[-1]
        with_node = _lost_with_its_node(slot, error)
        most = MAX_NODE_LOSSES if with_node else self._section.max_task_retries
        if slot.job is None:
            self._failed_starts[index, with_node] += 1
            deaths = self._failed_starts[index, with_node]
        else:
            counter = batch.node_losses if with_node else batch.deaths
            counter[slot.job] += 1
            deaths = counter[slot.job]
        is_hopeless = isinstance(error, RayActorError) and error.actor_init_failed
        if deaths > most or is_hopeless:
            raise RunError(f"{where}: the client actor was lost {deaths} time(s), the last time: {reason}")
        if slot.job is not None:
            batch.queue.appendleft(slot.job)
            self._observer.on_notice(Notice(f"a worker was lost during {where}; its clients run again elsewhere"))
        self._slots[index] = self._start(index)

    def _report_waiting(self, waited_s: float) -> None:
        """No actor is up: a line for the display, or the end."""
        section, gpus = self._section, ray.cluster_resources().get("GPU", 0.0)
        wish = f"{section.cpus_per_actor:g} CPUs and {section.gpus_per_actor:g} GPUs"
        if waited_s >= section.startup_timeout_s:
            reason = f"the cluster had no room for {wish} (see `ray status`)"
            raise RunError(f"no client actor came up within {section.startup_timeout_s:g} s: {reason}")
        nodes = sum(node["Alive"] for node in ray.nodes())
        there = f"the cluster has {nodes} node{'s' * (nodes != 1)} and {gpus:g} GPUs"
        waiting = f"waiting for the first of {self.num_actors} actors ({wish} each) for {waited_s:.0f} s; {there}"
        self._observer.on_notice(Notice(waiting))

    # -- slots ---------------------------------------------------------------------------------------------------------

    def _occupied(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot is not None]

    def _start(self, index: int) -> _Slot:
        section = self._section
        strategy: PlacementGroupSchedulingStrategy | None = None
        if self._trial:
            strategy = PlacementGroupSchedulingStrategy(self._trial, 1 + index)
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
        """Kill the actors that are inside a task (a synchronous one cannot be cancelled), and perhaps start others."""
        for index, slot in enumerate(self._slots):
            if slot is not None and slot.job is not None:
                self._stop_actor(index)
                self._slots[index] = self._start(index) if restart else None


def _lost_with_its_node(slot: _Slot, error: RayError) -> bool:
    """Whether a machine went, and not a process on it. Ray notices the connection first, and the death seconds later."""
    if isinstance(error, ActorUnavailableError | NodeDiedError):
        return True
    if isinstance(error, RayActorError) and error.preempted:
        return True
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return slot.node is not None and slot.node not in alive

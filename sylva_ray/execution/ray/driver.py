"""The driver of an experiment: connect to Ray, share the data, start the coordinator, pass its events on, and wait.

The driver owns the data and the backbone in the object store, so they remain there when a coordinator is restarted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.summary import Summary
from sylva_ray.execution.ray.coordinator_actor import Assignment, RemoteCoordinator
from sylva_ray.execution.ray.driver_context import DriverContext
from sylva_ray.execution.ray.pool import RayPool
from sylva_ray.execution.ray.session import NAMESPACE, possible_nodes, ray_session
from sylva_ray.execution.ray.shared_inputs import put_inputs
from sylva_ray.federation.observer import Event, Notice, Observer, dispatch
from sylva_ray.federation.pool import ClientPool
from sylva_ray.preparation.experiment import Prepared
from sylva_ray.provisioning.placement import resolve_num_actors
from sylva_ray.storage.remote_copy import RemoteFolder
from sylva_ray.storage.run_folder import RunFolder

POLL_S = 0.25
"""Seconds between two requests for events."""

NOTICE_S = 15.0
"""Seconds between notices while the coordinator does not answer yet: a busy machine takes long to start a process."""

FINAL_EVENTS_TIMEOUT_S = 5.0
"""Seconds that the end of a run waits for the last events."""


def run_on_ray(
    prepared: Prepared, num_actors: int, folder: RunFolder, observer: Observer, remote: RemoteFolder | None = None
) -> Summary:
    """Run an experiment through a `Coordinator` on the connected cluster.

    An interrupt kills the coordinator; the run can be resumed.

    Args:
        prepared: the experiment, its data and its backbone.
        num_actors: number of client actors.
        folder: of the run, which has been claimed.
        observer: of the run, e.g. a display.
        remote: the URL that gets a copy of ``folder`` after every stage; None: no copy.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: another driver on this cluster runs this folder.
        RunError: it failed while running, and can be resumed.
    """
    # in the store for as long as these names exist
    fleet, backbone = ray.put(prepared.fleet), ray.put(prepared.backbone)
    assignment = Assignment(
        config=prepared.config,
        num_actors=num_actors,
        setup_seconds=prepared.setup_seconds,
        changed_inputs=prepared.changed_inputs,
        notices=prepared.notices,
        fleet=fleet,
        backbone=backbone,
        folder=RunFolder(folder.path.resolve()),
        remote_url=remote.url if remote else None,
        driver=DriverContext.of_this_process(),
    )
    coordinator = _start_coordinator(assignment.folder, prepared.config.cluster.connect_timeout_s)
    try:
        _wait_for(coordinator, prepared.config.cluster.startup_timeout_s, observer)
        hang_timeout_s = prepared.config.cluster.hang_timeout_s
        return _follow(coordinator, coordinator.run.remote(assignment), observer, hang_timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RunError | UserError):
            raise error.cause from None
        raise  # a bug, whose traceback is needed
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunError(f"the coordinator was lost: {reason}") from error
    finally:
        ray.kill(coordinator)


def _wait_for(coordinator: ActorHandle[Any], timeout_s: float, observer: Observer) -> None:
    """Wait until the coordinator answers, with a notice every `NOTICE_S`.

    Raises:
        RunError: it has not within ``timeout_s``.
    """
    answer: ray.ObjectRef[int] = coordinator.pid.remote()
    waited_s = 0.0
    while not ray.wait([answer], timeout=min(NOTICE_S, timeout_s - waited_s))[0]:
        waited_s += NOTICE_S
        if waited_s >= timeout_s:
            raise RunError(f"the coordinator did not start within {timeout_s:g} s (cluster.startup_timeout_s)")
        observer.on_notice(Notice(f"waiting for the coordinator for {waited_s:.0f} s"))
    ray.get(answer)


@contextmanager
def ray_pool(prepared: Prepared, observer: Observer, shared: ActorHandle[Any] | None = None) -> Iterator[ClientPool]:
    """Provide a pool on Ray; see `sylva_ray.execution.run.pool_for`."""
    with cluster_for(prepared) as (prepared, num_actors):
        inputs = put_inputs(prepared, shared)
        pool = RayPool(prepared.config, inputs.fleet, inputs.backbone, num_actors, observer)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def cluster_for(prepared: Prepared) -> Iterator[tuple[Prepared, int]]:
    """Connect to Ray for as long as the block lasts.

    Yields:
        The experiment with a number for ``cluster.num_actors``, by what fits on the cluster, and the number.

    Raises:
        UserError: it does not fit on the cluster.
    """
    config, section = prepared.config, prepared.config.cluster
    with ray_session(section):
        num_clients = prepared.fleet.num_clients
        num_cohorts = -(-num_clients // config.training.cohort_size)
        num_actors = resolve_num_actors(section, num_cohorts, num_clients, possible_nodes(section))
        cluster = section.model_copy(update={"num_actors": num_actors})
        yield dataclasses.replace(prepared, config=config.model_copy(update={"cluster": cluster})), num_actors


def coordinator_name(folder: RunFolder) -> str:
    """Return the name of a run's coordinator, so that two drivers cannot run the same folder at once."""
    return f"coordinator-{hashlib.sha256(str(folder.path.resolve()).encode()).hexdigest()[:16]}"


def _start_coordinator(folder: RunFolder, timeout_s: float) -> ActorHandle[Any]:
    """Start a coordinator on the driver's own node, where the run folder is.

    Args:
        folder: of the run.
        timeout_s: how long to wait for an earlier coordinator of this run that is about to end.

    Raises:
        UserError: there is still another one.
    """
    own_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = RemoteCoordinator.options(name=coordinator_name(folder), namespace=NAMESPACE, scheduling_strategy=own_node)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            coordinator: ActorHandle[Any] = actor.remote()
        except ActorAlreadyExistsError:
            if time.monotonic() > deadline:
                fix = "is being run by another driver on this cluster; wait for it, or choose another folder"
                raise UserError("--out", str(folder), fix) from None
            time.sleep(POLL_S)
        else:
            return coordinator


def _follow(
    coordinator: ActorHandle[Any], result: ray.ObjectRef[Summary], observer: Observer, hang_timeout_s: float
) -> Summary:
    """Wait for the summary and pass the events on; end a coordinator that hangs, so that Ray restarts it."""
    events = _EventStream(coordinator, observer)
    while not ray.wait([result], timeout=POLL_S)[0]:
        events.poll(timeout_s=0)
        events.end_if_hung(hang_timeout_s)
    for _ in range(2):  # the request that is pending, and one for what happened since
        events.poll(FINAL_EVENTS_TIMEOUT_S)
    return ray.get(result)


class _EventStream:
    """A coordinator's events, in order and without repetition. At most one request is pending.

    Args:
        coordinator: the actor.
        observer: gets the events.
    """

    def __init__(self, coordinator: ActorHandle[Any], observer: Observer) -> None:
        self._coordinator, self._observer = coordinator, observer
        self._process_key, self._num_seen = "", 0
        self._process: int | None = None
        self._answered = time.monotonic()
        self._request: ray.ObjectRef[tuple[str, int, list[Event]]] | None = None

    def poll(self, timeout_s: float) -> None:
        """Pass on new events if the answer arrives within ``timeout_s`` seconds; during a restart it does not."""
        if self._request is None:
            self._request = self._coordinator.events.remote(self._process_key, self._num_seen)
        request = self._request
        if not ray.wait([request], timeout=timeout_s)[0]:
            return
        self._request = None
        try:
            process_key, self._process, events = ray.get(request)
            self._answered = time.monotonic()
        except RayError:  # the coordinator is lost; the result of `run` says why
            return
        if process_key != self._process_key:
            if self._process_key:
                text = "the coordinator failed and was restarted; it continues from the newest checkpoint"
                self._observer.on_notice(Notice(text))
            self._process_key, self._num_seen = process_key, 0
        self._num_seen += len(events)
        for event in events:
            dispatch(self._observer, event)

    def end_if_hung(self, timeout_s: float) -> None:
        """Kill the coordinator's process, on this machine, if it did not answer for ``timeout_s`` seconds."""
        if self._process is None or time.monotonic() - self._answered <= timeout_s:
            return
        self._observer.on_notice(Notice(f"the coordinator gave no sign of life for {timeout_s:.0f} s and is restarted"))
        with contextlib.suppress(ProcessLookupError):  # it has just been restarted
            os.kill(self._process, signal.SIGKILL)
        self._process, self._answered = None, time.monotonic()

"""What the driver does: connect, share the data, make the coordinator, pass its events on, and wait.

The driver owns the fleet's data and the backbone in the object store, so they outlive a coordinator. Nothing is written to the
run folder before the cluster has turned out to be usable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.summary import Summary
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.execution.ray.coordinator_actor import Assignment, RemoteCoordinator
from sylva_ray.execution.ray.pool import RayPool
from sylva_ray.execution.ray.session import NAMESPACE, possible_nodes, ray_session
from sylva_ray.federation.observer import Notice, Observer, tell
from sylva_ray.federation.pool import ClientPool
from sylva_ray.preparation.experiment import Prepared, create_worker
from sylva_ray.provisioning.placement import resolve_num_actors
from sylva_ray.storage.remote_copy import RemoteFolder
from sylva_ray.storage.run_folder import RunFolder

POLL_S = 0.25
"""How often the driver asks for events."""

STARTUP_TIMEOUT_S = 120.0
"""How long the coordinator's process may take to come up; it needs no free CPU."""

FINAL_EVENTS_TIMEOUT_S = 5.0
"""How long the end of a run waits for the last events."""

FORWARDED_VARIABLES = ("MLFLOW_", "AWS_", "FSSPEC_", "GOOGLE_", "AZURE_")
"""Prefixes of the driver's environment that the coordinator needs: the tracker's and the storage's."""


def run_prepared(
    prepared: Prepared, folder: RunFolder, resume: bool, observer: Observer, remote: RemoteFolder | None = None
) -> Summary:
    """Run an experiment where its config says.

    Args:
        prepared: the experiment, its data and its backbone.
        folder: of the run, on this machine.
        resume: whether the folder holds the run already.
        observer: of the run, e.g. a display.
        remote: the URL that gets a copy of ``folder`` after every stage; None: no copy.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: the cluster cannot hold it, or the run folder is not free; nothing was written.
        RunError: it failed while running, and can be resumed.
    """
    config = prepared.config
    if config.cluster.pool == "in_process":
        _claim(folder, config, resume, remote)
        worker = create_worker(config, prepared.fleet, prepared.backbone)
        return run_experiment(prepared, folder, InProcessPool(worker), observer, remote)
    with ray_session(config.cluster):
        prepared, num_actors = _with_num_actors(prepared)
        _claim(folder, prepared.config, resume, remote)
        return run_on_ray(prepared, num_actors, folder, observer, remote)


def _claim(folder: RunFolder, config: ResolvedConfig, resume: bool, remote: RemoteFolder | None) -> None:
    """Claim the folder here and at the URL, so that storage that cannot be written is found before the first round."""
    folder.claim(config, resume)
    if remote is not None:
        try:
            remote.push()
        except RunError as error:
            raise UserError("--out", str(remote), str(error)) from None


def run_on_ray(
    prepared: Prepared, num_actors: int, folder: RunFolder, observer: Observer, remote: RemoteFolder | None = None
) -> Summary:
    """Run an experiment through a `Coordinator` on the connected cluster.

    An interrupt kills the coordinator; the run can be resumed. The other arguments and the result are those of `run_prepared`.

    Args:
        num_actors: client actors to start.
    """
    fleet, backbone = ray.put(prepared.fleet), ray.put(prepared.backbone)  # kept alive by these names
    environment = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED_VARIABLES)}
    assignment = Assignment(
        prepared.config,
        num_actors,
        prepared.setup_seconds,
        fleet,
        backbone,
        folder.path.resolve(),
        remote.url if remote else None,
        Path.cwd(),
        environment,
    )
    coordinator = _make_coordinator(assignment.run_dir, prepared.config.cluster.connect_timeout_s)
    try:
        ray.get(coordinator.pid.remote(), timeout=STARTUP_TIMEOUT_S)
        return _follow(coordinator, coordinator.run.remote(assignment), observer)
    except GetTimeoutError as error:
        raise RunError(f"the coordinator did not come up within {STARTUP_TIMEOUT_S:g} s") from error
    except RayTaskError as error:
        if isinstance(error.cause, RunError | UserError):
            raise error.cause from None
        raise  # a bug: its traceback is worth more than one line
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunError(f"the coordinator was lost: {reason}") from error
    finally:
        ray.kill(coordinator)


@contextmanager
def pool_for(prepared: Prepared, observer: Observer) -> Iterator[ClientPool]:
    """Provide a pool where the config says, for as long as the block lasts.

    Args:
        prepared: the experiment, its data and its backbone.
        observer: hears of lost workers, and that workers are waited for.

    Raises:
        UserError: the cluster cannot hold it.
    """
    config = prepared.config
    if config.cluster.pool == "in_process":
        yield InProcessPool(create_worker(config, prepared.fleet, prepared.backbone))
        return
    with ray_session(config.cluster):
        prepared, num_actors = _with_num_actors(prepared)
        fleet, backbone = ray.put(prepared.fleet), ray.put(prepared.backbone)
        pool = RayPool(prepared.config, fleet, backbone, num_actors, observer)
        try:
            yield pool
        finally:
            pool.close()


def coordinator_name(run_dir: Path) -> str:
    """Unique on a cluster, and the same whenever this run folder is run: two drivers cannot run it at once."""
    return f"coordinator-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]}"


def _with_num_actors(prepared: Prepared) -> tuple[Prepared, int]:
    """Return the experiment with ``cluster.num_actors`` as a number, and that number, by what the cluster can hold."""
    config, section = prepared.config, prepared.config.cluster
    num_clients = prepared.fleet.num_clients
    num_cohorts = -(-num_clients // config.training.cohort_size)
    num_actors = resolve_num_actors(section, num_cohorts, num_clients, possible_nodes(section))
    cluster = section.model_copy(update={"num_actors": num_actors})
    return dataclasses.replace(prepared, config=config.model_copy(update={"cluster": cluster})), num_actors


def _make_coordinator(run_dir: Path, timeout_s: float) -> ActorHandle:
    """On the driver's own node, where the run folder is. A namesake that is just going away is waited for."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {
        "name": coordinator_name(run_dir),
        "namespace": NAMESPACE,
        "scheduling_strategy": here,
    }
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            return RemoteCoordinator.options(**options).remote()
        except ActorAlreadyExistsError:
            if time.monotonic() > give_up:
                fix = "is being run by another driver on this cluster; wait for it, or choose another folder"
                raise UserError("--out", str(run_dir), fix) from None
            time.sleep(POLL_S)


def _follow(coordinator: ActorHandle, result: ray.ObjectRef, observer: Observer) -> Summary:
    """Wait for the summary and pass the events on."""
    events = _EventStream(coordinator, observer)
    while not ray.wait([result], timeout=POLL_S)[0]:
        events.poll(timeout_s=0)
    events.poll(FINAL_EVENTS_TIMEOUT_S)  # what was asked before the end,
    events.poll(FINAL_EVENTS_TIMEOUT_S)  # and what happened since
    summary: Summary = ray.get(result)
    return summary


class _EventStream:
    """A coordinator's events in order, each once per process of it. It never has more than one question open."""

    def __init__(self, coordinator: ActorHandle, observer: Observer) -> None:
        self._coordinator, self._observer = coordinator, observer
        self._life, self._seen = "", 0
        self._question: ray.ObjectRef | None = None

    def poll(self, timeout_s: float) -> None:
        """Pass on what is new, if the answer comes within ``timeout_s`` (while it restarts, none comes)."""
        self._question = self._question or self._coordinator.events.remote(self._life, self._seen)
        if not ray.wait([self._question], timeout=timeout_s)[0]:
            return
        question, self._question = self._question, None
        try:
            life, events = ray.get(question)
        except RayError:  # the coordinator is gone, and `run` says why
            return
        if life != self._life:
            if self._life:
                text = "the coordinator failed and was restarted; it continues from the newest checkpoint"
                self._observer.on_notice(Notice(text))
            self._life, self._seen = life, 0
        self._seen += len(events)
        for event in events:
            tell(self._observer, event)

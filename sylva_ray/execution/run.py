"""Where an experiment is run: in this process, which needs no Ray, or on a Ray cluster.

Nothing is written to the run folder before the cluster has been checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.summary import Summary
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.observer import Notice, Observer
from sylva_ray.federation.pool import ClientPool
from sylva_ray.preparation.experiment import Prepared, create_worker
from sylva_ray.preparation.extension import PlannedExtension
from sylva_ray.preparation.inputs import claim_run
from sylva_ray.storage.remote_copy import RemoteFolder
from sylva_ray.storage.run_folder import RunFolder


def run_prepared(
    prepared: Prepared,
    folder: RunFolder,
    resume: bool,
    observer: Observer,
    remote: RemoteFolder | None = None,
    allow_changed: bool = False,
    extension: PlannedExtension | None = None,
) -> Summary:
    """Run an experiment in this process or on Ray, as ``cluster.pool`` says.

    Args:
        prepared: the experiment, its data and its backbone.
        folder: of the run, on this machine.
        resume: whether the folder holds the run already.
        observer: of the run, e.g. a display.
        remote: the URL that gets a copy of ``folder`` after every stage; None: no copy.
        allow_changed: whether data and weights may differ from those that the run began with.
        extension: rounds that the run gets now, with which ``prepared`` was made; written when all else is checked.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: it does not fit on the cluster, the run folder is not free, or data or weights have changed; nothing
            was written.
        RunError: it failed while running, and can be resumed.
    """

    def check() -> None:
        folder.check_claim(None if extension is not None else prepared.config, resume)

    def claim() -> Prepared:
        return _claim(prepared, folder, resume, allow_changed, observer, remote, extension)

    if prepared.config.cluster.pool == "in_process":
        check()
        with folder.locked():
            prepared = claim()
            worker = create_worker(prepared.config, prepared.fleet, prepared.backbone)
            return run_experiment(prepared, folder, InProcessPool(worker), observer, remote)
    from sylva_ray.execution.ray import driver  # only where it is used: importing Ray takes seconds

    with driver.cluster_for(prepared) as (prepared, num_actors):
        check()
        with folder.locked():  # released to the coordinator, which writes
            prepared = claim()
        return driver.run_on_ray(prepared, num_actors, folder, observer, remote)


def _claim(
    prepared: Prepared,
    folder: RunFolder,
    resume: bool,
    allow_changed: bool,
    observer: Observer,
    remote: RemoteFolder | None,
    extension: PlannedExtension | None,
) -> Prepared:
    """Claim the folder here and at the URL, so that storage without write access is found before the first stage."""

    def notify(text: str) -> None:
        observer.on_notice(Notice(text))

    prepared = claim_run(prepared, folder, resume, allow_changed, notify, extension)
    if remote is not None:
        try:
            remote.push()
        except RunError as error:
            raise UserError("--out", str(remote), str(error)) from None
    return prepared


@contextmanager
def pool_for(prepared: Prepared, observer: Observer, shared: Any = None) -> Iterator[ClientPool]:
    """Provide a pool, in this process or on Ray as ``cluster.pool`` says, for as long as the block lasts.

    Args:
        prepared: the experiment, its data and its backbone.
        observer: is notified of lost workers, and while no worker has started.
        shared: the actor that keeps data and backbone in the object store for several experiments; None: this is the
            only one.

    Yields:
        The pool.

    Raises:
        UserError: it does not fit on the cluster.
    """
    config = prepared.config
    if config.cluster.pool == "in_process":
        yield InProcessPool(create_worker(config, prepared.fleet, prepared.backbone))
        return
    from sylva_ray.execution.ray import driver  # only where it is used: importing Ray takes seconds

    with driver.ray_pool(prepared, observer, shared) as pool:
        yield pool

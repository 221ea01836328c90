"""Run one experiment: from prepared data to records, summary, report and adapters."""

from __future__ import annotations

import errno

from threadpoolctl import threadpool_limits

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.precision import precision_notices
from sylva_ray.core.summary import Summary
from sylva_ray.federation.client.worker import cohort_model, split_weights
from sylva_ray.federation.contract import stages_of_run
from sylva_ray.federation.loop import Rounds
from sylva_ray.federation.observer import Notice, Observer, Observers, StageStarted, Status
from sylva_ray.federation.parameters import unused_settings
from sylva_ray.federation.pool import ClientPool
from sylva_ray.federation.server import Server
from sylva_ray.federation.summary import RunCosts, summarise
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import full_model_bytes
from sylva_ray.models.export import export_clients
from sylva_ray.models.lora import LoraStack
from sylva_ray.observers.mlflow.tracker import MlflowTracker
from sylva_ray.observers.registry import create_observers
from sylva_ray.observers.run_files import RecordsFile, RemoteCopy
from sylva_ray.preparation.experiment import Prepared, initial_states
from sylva_ray.preparation.traffic import declared_traffic
from sylva_ray.storage.remote_copy import RemoteFolder
from sylva_ray.storage.run_folder import RunFolder

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, or of a share of it, that is full."""


def run_experiment(
    prepared: Prepared,
    folder: RunFolder,
    pool: ClientPool,
    observer: Observer,
    remote: RemoteFolder | None = None,
) -> Summary:
    """Run an experiment, or continue it from its newest checkpoint.

    NumPy's linear algebra runs on one thread: the last bits of a QR or an SVD depend on the number of threads, which
    differs between a Ray actor, a plain process and another machine. The matrices are small, so that one thread is also
    the fastest.

    Args:
        prepared: the experiment, its data and its backbone.
        folder: of the run, which has been claimed.
        pool: where tasks run.
        observer: of the run, e.g. a display.
        remote: the URL that gets a copy of the folder after every stage; None: no copy.

    Returns:
        The summary, which is also written to the folder.

    Raises:
        RunError: it failed while running and can be resumed.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        summary = _run(prepared, folder, pool, _all_observers(prepared.config, folder, observer, remote))
    if remote is not None:
        remote.push()
    return summary


def _all_observers(
    config: ResolvedConfig, folder: RunFolder, observer: Observer, remote: RemoteFolder | None
) -> Observers:
    """Return the observers of a run. The records come first: the others may read their file."""
    observers: list[Observer] = [RecordsFile(folder)]
    if config.tracking.enabled:
        observers.append(MlflowTracker(folder, config))
    observers += create_observers(config, folder.path)
    if remote is not None:
        observers.append(RemoteCopy(remote, observer.on_notice))
    return Observers([*observers, observer])


def _run(prepared: Prepared, folder: RunFolder, pool: ClientPool, observer: Observer) -> Summary:
    config, fleet = prepared.config, prepared.fleet
    algorithm = create_algorithm(config.algorithm)
    backbone = create_backbone(config.backbone, fleet.num_classes, split_weights(prepared.backbone)[0])
    full_model = full_model_bytes(backbone)  # before it becomes a part of the clients' model
    model = cohort_model(algorithm, config, backbone)
    initial = initial_states(algorithm, model, config, fleet.num_classes, prepared.backbone)
    players = model.players if isinstance(model, LoraStack) else {}
    server = Server(config, algorithm, fleet, initial, players, pool, folder, observer)
    server.changed_inputs = list(prepared.changed_inputs)
    stages = stages_of_run(algorithm, config)
    warnings: list[str] = []
    status: Status = "FAILED"
    try:
        chosen = {f"{key}.precision": getattr(config, key).precision for key in ("training", "evaluation")}
        unused = unused_settings(config.algorithm.name, algorithm.parameters)
        slow = precision_notices(chosen, config.training.device)
        for text in (*fleet.dataset.notices, *unused, *slow, *prepared.notices):
            observer.on_notice(Notice(text))
        num_run = Rounds(server, stages).run()
        observer.on_stage(StageStarted(len(stages), len(stages), "writing the report"))
        if isinstance(model, LoraStack) and fleet.num_clients <= config.cluster.max_exported:
            everyone, names = range(fleet.num_clients), fleet.dataset.class_names
            weights = split_weights(prepared.backbone)[0]
            export_clients(config, server.states, everyone, folder.adapters, names, weights=weights)
        written = None if num_run else _written_summary(folder)
        if written is None:
            traffic = declared_traffic(config, algorithm, initial, full_model)
            costs = RunCosts(traffic, pool.num_actors, prepared.setup_seconds, config.cluster.pool == "in_process")
            written = summarise(config, fleet, server.records, server.game, costs)
            folder.write_summary(written)
        summary = written
        _write_report(folder)
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"  # a sweep ends its trials in the same way
        raise
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        fix = "free some disk space, then resume" if error.errno in NO_SPACE else "resume when that is mended"
        raise RunError(f"{error.strerror or error}{place} while writing to {folder}: {fix}") from error
    finally:
        warnings = observer.on_end(status)
    if set(warnings) - set(summary.warnings):
        summary = summary.model_copy(update={"warnings": [*summary.warnings, *warnings]})
        folder.write_summary(summary)
        _write_report(folder)
    return summary


def _written_summary(folder: RunFolder) -> Summary | None:
    """Return the summary of a run that was stopped after it had been written; None where it has to be written."""
    try:
        return folder.load_summary()
    except UserError:
        return None


def _write_report(folder: RunFolder) -> None:
    from sylva_ray.reports.pages.run import write_report  # matplotlib, which the start of a run need not wait for

    write_report(folder)

"""One experiment: rounds to records, summary, report and adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.core.errors import RunError
from sylva_ray.federation.client.worker import build_model, split_weights
from sylva_ray.federation.loop import Record, Rounds
from sylva_ray.federation.pool import ClientPool
from sylva_ray.federation.summary import summarise
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import full_model_bytes
from sylva_ray.models.export import export_clients
from sylva_ray.models.lora import LoraStack
from sylva_ray.observers.mlflow.tracker import RunFollower
from sylva_ray.preparation.experiment import Prepared, initial_states
from sylva_ray.preparation.traffic import declared_traffic
from sylva_ray.storage.jsonl import rewrite_records
from sylva_ray.storage.remote_copy import RemoteFolder
from sylva_ray.storage.run_folder import RECORDS, write_summary


@threadpool_limits.wrap(limits=1, user_api="blas")
def run_experiment(
    prepared: Prepared,
    run_dir: Path,
    pool: ClientPool,
    on_event: Callable[[dict[str, Any]], None],
    remote: RemoteFolder | None = None,
) -> dict[str, Any]:
    """Run (or go on with) the experiment and return its summary, which is also written. ``remote`` gets a copy after every step.

    Numpy's linear algebra runs on one thread: the last bits of a QR or an SVD depend on the number of threads, which differs
    between a Ray actor, a plain process and another machine; the matrices are small, so one thread is also the fastest.

    Raises:
        RunError: a failure while running; the run folder can be resumed.
    """
    config, fleet = prepared.config, prepared.fleet
    algorithm = create_algorithm(config.algorithm)
    model = build_model(algorithm, config, fleet.num_classes, prepared.backbone)
    initial = initial_states(algorithm, model, config, fleet.num_classes, prepared.backbone)
    follower = RunFollower(run_dir, config) if config.tracking.enabled else None

    def on_record(records: list[Record]) -> None:
        rewrite_records(run_dir / RECORDS, records)
        if follower is not None:
            follower.notify()
        if remote is not None:
            try:
                remote.push()
            except RunError as error:  # the next step brings it along; the end insists
                on_event({"event": "unsaved", "reason": str(error)})

    rounds = Rounds(
        config,
        algorithm,
        fleet,
        initial,
        model.players if isinstance(model, LoraStack) else {},
        pool,
        run_dir,
        on_record,
        on_event,
    )
    status = "FAILED"
    try:
        rounds.run()
        on_event({"event": "finishing"})
        from sylva_ray.reports.pages.run import write_report  # matplotlib: the first step need not wait for it

        if isinstance(model, LoraStack):
            export_clients(config, rounds.server.states, range(fleet.num_clients), run_dir / "adapters")
        summary = summarise(
            config,
            fleet,
            rounds.server.records,
            rounds.server.game,
            declared_traffic(
                config,
                algorithm,
                initial,
                full_model_bytes(
                    create_backbone(config.backbone, fleet.num_classes, split_weights(prepared.backbone)[0])
                ),
            ),
            pool.num_actors,
            prepared.setup_seconds,
        )
        write_summary(run_dir, summary)
        write_report(run_dir)
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"  # a sweep prunes its trials so
        raise
    except OSError as error:
        raise RunError(f"{error.strerror or error} while writing to {run_dir}: make room, then resume") from error
    finally:
        warnings = follower.close(status, config.tracking.flush_timeout_s) if follower is not None else []
    if warnings:
        summary["warnings"] += warnings
        write_summary(run_dir, summary)
        write_report(run_dir)
    if remote is not None:
        remote.push()
    return summary

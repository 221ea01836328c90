"""MLflow follows a run folder; the run never waits for it. The only file that imports mlflow (2-3 s, in a thread).

::

    run ── rounds.jsonl, summary.json, ... ──► Delivery ──► MlflowStore
     └──── on_record(), on_end() ──► MlflowTracker's thread ──┘   (tracking.json: how far we got)
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sylva_ray import __version__
from sylva_ray.config.experiment import ExperimentConfig, TrackingSection
from sylva_ray.core.credentials import mask_credentials
from sylva_ray.core.records import StageRecord
from sylva_ray.federation.observer import Observer, Status
from sylva_ray.observers.mlflow.delivery import Delivery, DeliveryState
from sylva_ray.storage.run_folder import RunFolder

RUN_TAG = "sylva_ray.run"
"""Marks the MLflow run of one run folder, so that a run made by a call whose answer got lost is found again."""

PARENT_TAG = "mlflow.parentRunId"
SWEEP_TAG = "sylva.kind"
"""Marks the run of a whole sweep, which has trials under it and no result of its own."""

SWEEP_NAME_TAG = "sylva.sweep"
"""On a sweep's parent run and its trials: the name of its folder."""

METRICS_PER_BATCH, PARAMS_PER_BATCH, PARAM_LENGTH = 1000, 100, 6000
"""MLflow's own limits."""

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # we try again ourselves
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Set before mlflow is imported, where the user has not set them."""


def tracking_uri(section: TrackingSection, run_dir: Path) -> str:
    """``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else an sqlite store beside the run folder."""
    beside = f"sqlite:///{Path(run_dir).absolute().parent / 'mlflow.db'}"
    return section.uri or os.environ.get("MLFLOW_TRACKING_URI") or beside


class MlflowTracker(Observer):
    """Sends a run folder to MLflow from a daemon thread.

    Only `on_end` waits for the server, and at most ``tracking.flush_timeout_s`` seconds.

    Args:
        folder: of the run.
        config: resolved.
    """

    def __init__(self, folder: RunFolder, config: ExperimentConfig) -> None:
        self._store = MlflowStore(folder.path, config)
        self._delivery = Delivery(folder, config, self._store)
        self._timeout_s = config.tracking.flush_timeout_s
        self._wake = threading.Event()
        self._status: Status | None = None
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """See `Observer.on_resume`."""
        del records
        self._notify()

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`. The thread reads the record from ``rounds.jsonl``, which is written before."""
        del record
        self._notify()

    def _notify(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._wake.set()

    def on_end(self, status: Status) -> list[str]:
        """Send the rest and end the MLflow run, within the time limit, whatever the server does.

        Args:
            status: of the run.

        Returns:
            Warnings that name what was not sent, why, and how to send it; none if all arrived.
        """
        self._delivery.expect_end()
        self._status = status
        self._notify()
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            self._delivery.problem = self._delivery.problem or f"no answer within {self._timeout_s:g} s"
            self._store.abandoned.set()
        return self._delivery.warnings()

    def _follow(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._status is not None:
                self._delivery.finish(self._status, self._store.abandoned)
                return
            self._delivery.send_records()


def send_run(folder: RunFolder, config: ExperimentConfig) -> list[str]:
    """Send what MLflow lacks of a run folder, now.

    A run without a summary was stopped and is marked as killed; the run itself corrects that when it is resumed.

    Returns:
        Warnings, as `MlflowTracker.on_end`.
    """
    store = MlflowStore(folder.path, config)
    delivery = Delivery(folder, config, store)
    delivery.finish("FINISHED" if folder.load_summary() else "KILLED", store.abandoned)
    return delivery.warnings()


def experiment_files(
    experiment: str, uri: str, names: Collection[str], sweep: str | None = None
) -> dict[str, tuple[str, dict[str, str]]] | None:
    """``{run id: (run name, {file name: text})}`` for those of the artifacts ``names`` that each run has, oldest run first,
    without the parent runs of sweeps, and with ``sweep`` only that one's trials; None if there is no such experiment. Raises
    whatever the store does."""
    client = _client(uri)
    known = client.get_experiment_by_name(experiment)
    if known is None or known.lifecycle_stage != "active":
        return None
    found: dict[str, tuple[str, dict[str, str]]] = {}
    page: Any = None
    while page is None or page.token:
        token = page.token if page else None
        page = client.search_runs([known.experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        for run in page:
            if SWEEP_TAG in run.data.tags or (sweep is not None and run.data.tags.get(SWEEP_NAME_TAG) != sweep):
                continue
            run_id, files = run.info.run_id, {}
            for path in {file.path for file in client.list_artifacts(run_id)} & set(names):
                with tempfile.TemporaryDirectory() as folder:
                    files[path] = Path(client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")
            found[run_id] = run.info.run_name or run_id, files
    return found


def _client(uri: str) -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client: Any, name: str, uri: str) -> str:
    """Of the experiment, which is made if need be."""
    known = client.get_experiment_by_name(name)
    if known is None:
        location = None  # a server knows where; for sqlite MLflow would take the current directory
        if uri.startswith("sqlite:///"):
            location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception:
            known = client.get_experiment_by_name(name)  # another run may have been faster
            if known is None:
                raise
    return str(known.experiment_id)


def open_sweep(uri: str, experiment: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """Make the run of a sweep, under which its trials are shown; returns its id. Raises whatever the store does."""
    client = _client(uri)
    all_tags = {SWEEP_TAG: "sweep", "sylva_ray_version": __version__, "mlflow.source.name": "sylva-ray", **tags}
    run = client.create_run(_experiment_id(client, experiment, uri), tags=all_tags, run_name=name)
    for key, value in params.items():
        client.log_param(run.info.run_id, key, mask_credentials(value)[:PARAM_LENGTH])
    return str(run.info.run_id)


def update_sweep(
    uri: str, run_id: str, status: str, metrics: Mapping[str, float], note: str, files: Iterable[Path]
) -> None:
    """Status (RUNNING again when it is resumed), numbers, the Markdown that MLflow shows above the run, and files.
    Raises whatever the store does."""
    client = _client(uri)
    for key, value in metrics.items():
        client.log_metric(run_id, key, value)
    if note:
        client.set_tag(run_id, "mlflow.note.content", note)
    for path in files:
        client.log_artifact(run_id, str(path))
    if status == "RUNNING":
        client.update_run(run_id, status)
    else:
        client.set_terminated(run_id, status)


class MlflowStore:
    """One MLflow run, through an explicit client (MLflow's global active run stays the user's).

    After ``abandoned`` is set, by the thread that no longer wants to wait, every further call raises.
    """

    def __init__(self, run_dir: Path, config: ExperimentConfig) -> None:
        self.uri = tracking_uri(config.tracking, run_dir)
        self.run_name = config.tracking.run_name or run_dir.name
        self.config = config
        self.abandoned = threading.Event()
        self._client: Any = None
        self._run_id = ""

    def open_run(self, state: DeliveryState) -> None:
        """See `Store`. A new run gets the tags and the resolved config as parameters."""
        if self._client is not None:
            return
        client = self._call(_client, self.uri)
        experiment_id = self._call(_experiment_id, client, self.config.tracking.experiment, self.uri)
        state.update()  # the key is on disk before the store has a run with it
        query = f"tags.`{RUN_TAG}` = '{state.key}'"
        found = self._call(client.search_runs, [experiment_id], query, max_results=1)
        if found:
            run = found[0]
        else:
            run = self._call(client.create_run, experiment_id, state.started_ms, self._tags(state.key), self.run_name)
            state.update(records_sent=0)
        self._run_id = run.info.run_id
        if run.info.status != "RUNNING":
            self._call(client.update_run, self._run_id, "RUNNING")
        self._log_params(client, known=run.data.params)
        state.update(experiment_id=experiment_id, run_id=self._run_id, finished=False)
        self._client = client

    def log_metrics(self, values: Mapping[str, float], time_ms: int, step: int) -> None:
        """See `Store`."""
        from mlflow.entities import Metric

        metrics = (Metric(name, value, time_ms, step) for name, value in values.items())
        for batch in _batches(metrics, METRICS_PER_BATCH):
            self._call(self._client.log_batch, self._run_id, metrics=batch)

    def log_text(self, text: str, name: str) -> None:
        """See `Store`."""
        self._call(self._client.log_text, self._run_id, text, name)

    def log_file(self, path: Path) -> None:
        """See `Store`."""
        self._call(self._client.log_artifact, self._run_id, str(path))

    def log_folder(self, path: Path, name: str) -> None:
        """See `Store`."""
        self._call(self._client.log_artifacts, self._run_id, str(path), name)

    def end_run(self, status: str) -> None:
        """See `Store`."""
        self._call(self._client.set_terminated, self._run_id, status)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.abandoned.is_set():
            raise TimeoutError("out of time")
        return function(*args, **kwargs)

    def _tags(self, key: str) -> dict[str, str]:
        names = {"algorithm": self.config.algorithm.name, "dataset": self.config.dataset.name}
        names |= self.config.tracking.tags
        if self.config.tracking.parent_run_id is not None:
            names[PARENT_TAG] = self.config.tracking.parent_run_id
        return names | {"sylva_ray_version": __version__, RUN_TAG: key, "mlflow.source.name": "sylva-ray"}

    def _log_params(self, client: Any, known: Collection[str]) -> None:
        """Those not yet known: MLflow never changes a parameter, but `cluster` may be another when a run is resumed."""
        from mlflow.entities import Param

        flat = {key: mask_credentials(value)[:PARAM_LENGTH] for key, value in self.config.flat().items()}
        params = (Param(key, value) for key, value in flat.items() if key not in known)
        for batch in _batches(params, PARAMS_PER_BATCH):
            self._call(client.log_batch, self._run_id, params=batch)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch

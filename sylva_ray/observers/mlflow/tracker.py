"""Tracking with MLflow: the observer of a run, the runs of sweeps, and the client behind them.

A thread reads the run folder and sends it, so that the run never waits for the server. This is the only module that
imports mlflow, inside functions, because the import takes 2 to 3 seconds::

    run ── rounds.jsonl, summary.json, ... ──► Delivery ──► MlflowStore
     └──── on_record(), on_end() ──► MlflowTracker's thread ──┘   (tracking.json: what has arrived)
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.tracking import TrackingSection, check_store
from sylva_ray.core.credentials import mask_value, mask_yaml
from sylva_ray.core.errors import UserError
from sylva_ray.core.records import StageRecord
from sylva_ray.core.version import __version__
from sylva_ray.federation.observer import Observer, Status
from sylva_ray.observers.mlflow.delivery import Delivery, DeliveryState
from sylva_ray.storage.run_folder import RunFolder

URI_VARIABLE = "MLFLOW_TRACKING_URI"
"""MLflow's environment variable for the address of the store."""

RUN_TAG = "sylva_ray.run"
"""Tag that identifies the MLflow run of a run folder, also where the reply to the call that created it was lost."""

PARENT_TAG = "mlflow.parentRunId"
"""MLflow's tag for the run that another run is nested under."""

SWEEP_TAG = "sylva.kind"
"""Tag of a sweep's parent run, which groups the trials and has no result."""

SWEEP_NAME_TAG = "sylva.sweep"
"""Tag of a sweep's parent run and of its trials: the name of the sweep's folder."""

NOTE = "mlflow.note.content"
"""MLflow's tag for the description of a run, in Markdown."""

REPLACED_TAG = "sylva_ray.replaced_by"
"""Tag of a run that another one replaces, because some of its stages were done again."""

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tags of a new experiment: MLflow then shows training runs, and no pages about language models."""

MAX_METRICS_PER_BATCH, MAX_PARAMS_PER_BATCH, MAX_PARAM_LENGTH, MAX_DIGEST_LENGTH = 1000, 100, 6000, 36
"""Limits of MLflow's API; lengths are in characters."""

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # `Delivery` retries
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Environment variables that are set before mlflow is imported, unless the user has set them."""


def tracking_uri(section: TrackingSection, run_dir: Path) -> str:
    """Return the address of the MLflow store of a run, see `store_address`, after a check of its protocol.

    Args:
        section: tracking section of the configuration.
        run_dir: the run folder.

    Raises:
        UserError: MLflow has no stores with this protocol, or no file is named, and the address of one beside the run
            folder would be that of another file.
    """
    uri = store_address(section, run_dir)
    is_given = section.uri or os.environ.get(URI_VARIABLE)
    if not is_given and any(letter in uri for letter in "%?"):
        fix = f"must be given: the address of a file in {Path(run_dir).absolute().parent} cannot contain % or ?"
        raise UserError("tracking.uri", None, fix)
    try:
        check_store(uri)
    except ValueError as error:
        raise UserError("tracking.uri" if section.uri else URI_VARIABLE, uri, str(error)) from None
    return uri


def store_address(section: TrackingSection, run_dir: Path) -> str:
    """Return ``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else that of an SQLite file next to the run folder."""
    beside = f"sqlite:///{Path(run_dir).absolute().parent / 'mlflow.db'}"
    return section.uri or os.environ.get(URI_VARIABLE) or beside


class MlflowTracker(Observer):
    """Sends a run folder to MLflow from a daemon thread.

    Only `on_end` waits for the server, for at most ``tracking.flush_timeout_s`` seconds.

    Args:
        folder: the run folder.
        config: configuration of the run.
    """

    def __init__(self, folder: RunFolder, config: ExperimentConfig) -> None:
        self._store = MlflowStore(folder, config)
        self._delivery = Delivery(folder, config, self._store)
        self._timeout_s = config.tracking.flush_timeout_s
        self._wake = threading.Event()
        self._status: Status | None = None
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """See `Observer.on_resume`. A finished run that has arrived completely is left as it is in MLflow."""
        self._delivery.rewind(len(records))
        if not self._delivery.has_arrived(len(records)):
            self._notify()

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`. The thread reads the record from ``rounds.jsonl``, which is already written."""
        del record
        self._notify()

    def _notify(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._wake.set()

    def on_end(self, status: Status) -> list[str]:
        """Send what is missing and end the MLflow run; stop waiting after ``tracking.flush_timeout_s`` seconds.

        Args:
            status: how the run ended.

        Returns:
            Warnings that say what has not arrived, why, and how to send it; empty if everything has.
        """
        if self._thread.ident is None and self._delivery.state.finished:
            return []
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
    """Send what MLflow lacks of a run folder, and wait until it has arrived.

    A run without a summary is marked as killed; resuming the run corrects the mark.

    Args:
        folder: the run folder.
        config: configuration of the run.

    Returns:
        Warnings, as `MlflowTracker.on_end`.
    """
    store = MlflowStore(folder, config)
    delivery = Delivery(folder, config, store)
    delivery.finish("FINISHED" if folder.load_summary() else "KILLED", store.abandoned)
    return delivery.warnings()


def send_rest(folder: RunFolder, config: ExperimentConfig) -> list[str]:
    """Send what MLflow lacks of a run that has finished, and wait until it has arrived.

    Nothing is sent where everything has arrived, or where ``tracking.json`` belongs to another store.

    Args:
        folder: the run folder, which is locked meanwhile.
        config: configuration of the run.

    Returns:
        Warnings, as `MlflowTracker.on_end`.
    """
    uri = mask_value(store_address(config.tracking, folder.path))
    if folder.tracking_file.exists():
        state = DeliveryState.read(folder)
        if state is None or state.uri != uri or state.finished:
            return []
    with folder.locked():
        return send_run(folder, config)


class TrackedRun(NamedTuple):
    """A run in an MLflow experiment.

    Attributes:
        name: name of the run.
        files: contents of its text artifacts by file name.
    """

    name: str
    files: dict[str, str]


def experiment_files(
    experiment: str, uri: str, names: Collection[str], sweep: str | None = None
) -> dict[str, TrackedRun] | None:
    """Download text artifacts of the runs in an experiment. Parents of sweeps, and replaced runs, are left out.

    Args:
        experiment: name of the experiment.
        uri: address of the store.
        names: names of the artifacts; a run may lack some of them.
        sweep: if given, only the trials of the sweep of that name.

    Returns:
        The runs by their identifier, oldest first; None if there is no such experiment.

    Raises:
        Exception: any error of the store.
    """
    client = _client(uri)
    entry = client.get_experiment_by_name(experiment)
    if entry is None or entry.lifecycle_stage != "active":
        return None
    runs: dict[str, TrackedRun] = {}
    page: Any = None
    while page is None or page.token:
        token = page.token if page else None
        page = client.search_runs([entry.experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        for run in page:
            if {SWEEP_TAG, REPLACED_TAG} & run.data.tags.keys() or (
                sweep is not None and run.data.tags.get(SWEEP_NAME_TAG) != sweep
            ):
                continue
            run_id = run.info.run_id
            runs[run_id] = TrackedRun(run.info.run_name or run_id, _download_texts(client, run_id, names))
    return runs


def _download_texts(client: Any, run_id: str, names: Collection[str]) -> dict[str, str]:
    texts = {}
    for path in {file.path for file in client.list_artifacts(run_id)} & set(names):
        with tempfile.TemporaryDirectory() as folder:
            texts[path] = Path(client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")
    return texts


def _client(uri: str) -> Any:
    """Import mlflow and return a client of the store."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client: Any, name: str, uri: str) -> str:
    """Return the identifier of the experiment; create the experiment if it does not exist."""
    entry = client.get_experiment_by_name(name)
    if entry is None:
        location = None  # a server chooses; for SQLite, MLflow would choose the current directory
        if uri.startswith("sqlite:///"):
            file = unquote(uri.removeprefix("sqlite:///").partition("?")[0])
            location = (Path(file).absolute().parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))
        except Exception:
            entry = client.get_experiment_by_name(name)  # another run may have created it in the meantime
            if entry is None:
                raise
    return str(entry.experiment_id)


def open_sweep(uri: str, experiment: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """Create the parent run of a sweep, under which MLflow shows the trials.

    Args:
        uri: address of the store.
        experiment: name of the experiment, which is created if it does not exist.
        name: name of the run.
        params: parameters to log.
        tags: tags besides those that every sweep has.

    Returns:
        The identifier of the run.

    Raises:
        Exception: any error of the store.
    """
    client = _client(uri)
    all_tags = {SWEEP_TAG: "sweep", "sylva_ray_version": __version__, "mlflow.source.name": "sylva-ray", **tags}
    run = client.create_run(_experiment_id(client, experiment, uri), tags=all_tags, run_name=name)
    for key, value in params.items():
        client.log_param(run.info.run_id, key, str(mask_value(value))[:MAX_PARAM_LENGTH])
    return str(run.info.run_id)


def update_sweep(
    uri: str, run_id: str, status: str, metrics: Mapping[str, float], note: str, files: Iterable[Path]
) -> None:
    """Update the parent run of a sweep.

    Args:
        uri: address of the store.
        run_id: identifier of the run.
        status: ``RUNNING`` when a sweep is resumed, else how it ended.
        metrics: metrics to log.
        note: Markdown that MLflow shows above the run; empty to leave it as it is.
        files: files to attach.

    Raises:
        Exception: any error of the store.
    """
    client = _client(uri)
    for key, value in metrics.items():
        client.log_metric(run_id, key, value)
    if note:
        client.set_tag(run_id, NOTE, note)
    for path in files:
        if path.suffix == ".yaml":
            client.log_text(run_id, mask_yaml(path.read_text()), path.name)
        else:
            client.log_artifact(run_id, str(path))
    if status == "RUNNING":
        client.update_run(run_id, status)
    else:
        client.set_terminated(run_id, status)


class MlflowStore:
    """The MLflow run of a run folder; implements `sylva_ray.observers.mlflow.delivery.Store`.

    It uses a client of its own and does not touch MLflow's global active run.

    Args:
        folder: the run folder.
        config: configuration of the run.

    Attributes:
        uri: address of the store; may contain credentials.
        run_name: name of the run in MLflow.
        abandoned: once set, every further call raises ``TimeoutError``.
    """

    def __init__(self, folder: RunFolder, config: ExperimentConfig) -> None:
        self.uri = store_address(config.tracking, folder.path)
        self.folder = folder
        self.run_name = config.tracking.run_name or folder.path.name
        self.config = config
        self.abandoned = threading.Event()
        self._client: Any = None
        self._run_id = ""

    def open_run(self, state: DeliveryState) -> None:
        """See `Store.open_run`. A new run gets tags, and the flattened configuration as its parameters."""
        if self._client is not None:
            return
        client = self._call(_client, self.uri)
        experiment_id = self._call(_experiment_id, client, self.config.tracking.experiment, self.uri)
        state.update()  # save the key before the store has a run with it
        query = f"tags.`{RUN_TAG}` = '{state.key}'"
        matches = self._call(client.search_runs, [experiment_id], query, max_results=1)
        if matches:
            run = matches[0]
            self._call(self._follow_parent, client, run)
        else:
            run = self._call(client.create_run, experiment_id, state.started_ms, self._tags(state.key), self.run_name)
            state.update(records_sent=0)
            self._log_dataset(client, run.info.run_id)
        if state.replaced_run_id is not None:
            self._call(_mark_replaced, client, state.replaced_run_id, run.info.run_id)
        self._run_id = run.info.run_id
        if run.info.status != "RUNNING":
            self._call(client.update_run, self._run_id, "RUNNING")
        self._log_params(client, logged=run.data.params)
        parent = self.config.tracking.parent_run_id
        state.update(
            experiment_id=experiment_id,
            run_id=self._run_id,
            parent_run_id=parent,
            finished=False,
            replaced_run_id=None,
        )
        self._client = client

    def log_metrics(self, values: Mapping[str, float], time_ms: int, step: int) -> None:
        """See `Store.log_metrics`."""
        from mlflow.entities import Metric

        metrics = (Metric(name, value, time_ms, step) for name, value in values.items())
        for batch in _batches(metrics, MAX_METRICS_PER_BATCH):
            self._call(self._client.log_batch, self._run_id, metrics=batch)

    def log_text(self, text: str, name: str) -> None:
        """See `Store.log_text`."""
        self._call(self._client.log_text, self._run_id, text, name)

    def log_table(self, table: Mapping[str, Sequence[Any]], name: str) -> None:
        """See `Store.log_table`."""
        self._call(self._client.log_table, self._run_id, dict(table), name)

    def describe(self, note: str) -> None:
        """See `Store.describe`."""
        self._call(self._client.set_tag, self._run_id, NOTE, note)

    def log_file(self, path: Path) -> None:
        """See `Store.log_file`."""
        self._call(self._client.log_artifact, self._run_id, str(path))

    def log_folder(self, path: Path, name: str) -> None:
        """See `Store.log_folder`."""
        self._call(self._client.log_artifacts, self._run_id, str(path), name)

    def end_run(self, status: str) -> None:
        """See `Store.end_run`."""
        self._call(self._client.set_terminated, self._run_id, status)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.abandoned.is_set():
            raise TimeoutError("out of time")
        return function(*args, **kwargs)

    def _tags(self, key: str) -> dict[str, str]:
        tags = {"algorithm": self.config.algorithm.name, "dataset": self.config.dataset.name}
        tags |= self.config.tracking.tags
        if self.config.tracking.parent_run_id is not None:
            tags[PARENT_TAG] = self.config.tracking.parent_run_id
        return tags | {"sylva_ray_version": __version__, RUN_TAG: key, "mlflow.source.name": "sylva-ray"}

    def _follow_parent(self, client: Any, run: Any) -> None:
        """Put a run that is there already under the parent of today; a sweep may have got another one."""
        parent = self.config.tracking.parent_run_id
        if parent is not None and run.data.tags.get(PARENT_TAG) != parent:
            client.set_tag(run.info.run_id, PARENT_TAG, parent)

    def _log_dataset(self, client: Any, run_id: str) -> None:
        """Log the data set with the digest of its images and labels, which the run folder has from its start."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = self.folder.load_inputs()
        if inputs is not None:
            digest = hashlib.sha256(repr(sorted(inputs.data.items())).encode()).hexdigest()[:MAX_DIGEST_LENGTH]
            dataset = Dataset(self.config.dataset.name, digest, "sylva_ray", self.config.dataset.model_dump_json())
            self._call(
                client.log_inputs, run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
            )

    def _log_params(self, client: Any, logged: Collection[str]) -> None:
        """Log the parameters that are not in ``logged``.

        MLflow refuses to change a parameter, but `cluster` may differ when a run is resumed.
        """
        from mlflow.entities import Param

        values = {key: str(mask_value(value))[:MAX_PARAM_LENGTH] for key, value in self.config.flat().items()}
        params = (Param(key, value) for key, value in values.items() if key not in logged)
        for batch in _batches(params, MAX_PARAMS_PER_BATCH):
            self._call(client.log_batch, self._run_id, params=batch)


def _mark_replaced(client: Any, old: str, new: str) -> None:
    """Mark a run whose last stages were done again, with other values, as replaced by another one."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_tag(old, REPLACED_TAG, new)
        if client.get_run(old).info.status == "RUNNING":
            client.set_terminated(old, "KILLED")
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # else it has been deleted
            raise


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch

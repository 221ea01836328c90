"""Delivery of a run folder to a tracking store: what is sent, in which order, and what has arrived.

Everything is read from the run folder. What an unreachable or slow store did not accept is sent again after the next
record, at the end of the run, when the run is resumed, and by ``sylva-ray track RUN``; a warning lists it until then.
Sending a value twice does no harm: its timestamp is the start of the run plus the wall seconds of its records, so that
the store recognises the duplicate. Stages that are computed again have other seconds: where some of those that have
arrived are, because rounds were added or a checkpoint was damaged, the run is sent as another one, which replaces it.
"""

from __future__ import annotations

import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.credentials import mask_value, mask_yaml
from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Summary
from sylva_ray.core.text import as_argument
from sylva_ray.observers.metrics import (
    client_table,
    evaluation_metrics,
    record_metrics,
    summary_metrics,
    without_clients,
)
from sylva_ray.observers.mlflow.model import save_model
from sylva_ray.reports.attack_titles import attack_titles
from sylva_ray.reports.headlines import accuracy_text
from sylva_ray.storage.atomic import write_json
from sylva_ray.storage.reading import read_json
from sylva_ray.storage.run_folder import RunFolder

FIGURES, CLIENTS, MODEL = "figures", "clients.json", "model"
"""Names in MLflow of what the run folder has not: the figures, the table of clients, and the clients as a model."""

MAX_END_ATTEMPTS = 3
"""How often the end of a run is sent before the delivery gives up."""

PAUSE_S = 1.0
"""Seconds between these attempts."""


@dataclass
class DeliveryState:
    """Progress of a delivery, kept in ``tracking.json`` in the run folder so that it survives a crash of the run.

    Attributes:
        path: the file.
        uri: the store's URI, without credentials; a delivery to another store begins with a new state.
        key: a random tag of the run in the store.
        started_ms: Unix time in milliseconds that the metrics' timestamps count from.
        experiment_id: identifier of the experiment in the store.
        run_id: identifier of the run in the store.
        records_sent: number of lines of ``rounds.jsonl`` that have arrived.
        finished: whether the artifacts have arrived as well.
        replaced_run_id: run in the store that this one replaces, and that is not marked yet; None: there is none.
        parent_run_id: run in the store that this one is a child of; None: of none.
    """

    path: Path
    uri: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_ms: int = field(default_factory=lambda: int(1000 * time.time()))
    experiment_id: str | None = None
    run_id: str | None = None
    records_sent: int = 0
    finished: bool = False
    replaced_run_id: str | None = None
    parent_run_id: str | None = None

    @classmethod
    def load(cls, folder: RunFolder, uri: str) -> DeliveryState:
        """Read the state of a run folder.

        Args:
            folder: the run folder.
            uri: the store's URI, without credentials.

        Returns:
            The saved state; a new, unsaved one where there is none, it is damaged, or it belongs to another store.
        """
        state = cls.read(folder)
        return state if state is not None and state.uri == uri else cls(folder.tracking_file, uri)

    @classmethod
    def read(cls, folder: RunFolder) -> DeliveryState | None:
        """Read the state of a run folder; None where there is none, or it is damaged."""
        path = folder.tracking_file
        try:
            content = read_json(path, "tracking", "")
            state = cls(path, **content)
        except (FileNotFoundError, UserError, TypeError):  # the run is sent again, under a new key
            return None
        texts, numbers = (state.uri, state.key), (state.started_ms, state.records_sent)
        is_valid = (
            all(isinstance(text, str) for text in texts)
            and all(type(number) is int and number >= 0 for number in numbers)
            and all(isinstance(name, str | None) for name in (state.experiment_id, state.run_id))
            and all(isinstance(name, str | None) for name in (state.replaced_run_id, state.parent_run_id))
            and isinstance(state.finished, bool)
        )
        return state if is_valid else None

    def update(self, **changes: Any) -> None:
        """Change the fields and replace the file atomically."""
        for name, value in changes.items():
            setattr(self, name, value)
        write_json(self.path, {name: value for name, value in asdict(self).items() if name != "path"})


class Store(Protocol):
    """Interface of a tracking store. Its methods may block and may raise any exception.

    Attributes:
        uri: address of the store; may contain credentials.
    """

    uri: str

    def open_run(self, state: DeliveryState) -> None:
        """Find or create the run tagged ``state.key`` and mark it as running; do nothing if it is open already."""

    def log_metrics(self, values: Mapping[str, float], time_ms: int, step: int) -> None:
        """Add the values of metrics at one step; ``time_ms`` is in Unix milliseconds."""

    def log_text(self, text: str, name: str) -> None:
        """Add a text file."""

    def log_table(self, table: Mapping[str, Sequence[Any]], name: str) -> None:
        """Add a table, ``{column: values}``."""

    def describe(self, note: str) -> None:
        """Set the description of the run, in Markdown."""

    def log_file(self, path: Path) -> None:
        """Add a file under its own name."""

    def log_folder(self, path: Path, name: str) -> None:
        """Add a folder's files under ``name/``."""

    def end_run(self, status: str) -> None:
        """Mark the run as ended; ``status`` is FINISHED, FAILED or KILLED."""


class Delivery:
    """Sends one run folder to one store.

    The public methods block as long as the store does. An error of the store is kept in ``problem`` and never raised.

    Args:
        folder: the run folder.
        config: configuration of the run.
        store: receives the run.

    Attributes:
        state: what has arrived.
        problem: why the last attempt failed; None if it succeeded.
    """

    def __init__(self, folder: RunFolder, config: ExperimentConfig, store: Store) -> None:
        self.folder, self.config, self.store = folder, config, store
        self.state = DeliveryState.load(folder, mask_value(store.uri))
        self.problem: str | None = None
        self._unsent: list[str] = []

    def has_arrived(self, num_records: int) -> bool:
        """Return whether the store has a finished run and its artifacts, of as many records."""
        return self.state.finished and self.state.records_sent == num_records

    def rewind(self, num_records: int) -> None:
        """Begin another run in the store if this one has more records: those after ``num_records`` are made again."""
        old = self.state
        if old.records_sent > num_records:
            self.state = DeliveryState(old.path, old.uri, replaced_run_id=old.run_id)
            self.state.update()

    def send_records(self) -> bool:
        """Send the records that the store lacks; return whether all arrived."""
        return self._try(self._send_records)

    def expect_end(self) -> None:
        """List the end of the run and its artifacts among the warnings until they have arrived."""
        self._unsent = ["the end of the run", *self._artifacts()]

    def finish(self, status: str, abandoned: threading.Event) -> bool:
        """Send everything that is missing and end the run, in up to `MAX_END_ATTEMPTS` attempts.

        Args:
            status: how the run ended.
            abandoned: ends the attempts when set.

        Returns:
            Whether everything arrived.
        """
        self.expect_end()
        for attempt in range(MAX_END_ATTEMPTS):
            if attempt and abandoned.wait(PAUSE_S):
                break
            if self._try(lambda: self._send_everything(status)):
                return True
        return False

    def warnings(self) -> list[str]:
        """Return one line that says what has not arrived, why, and how to send it; nothing if everything has."""
        path = self.folder.records_file
        total = path.read_bytes().count(b"\n") if path.exists() else 0
        num_missing = total - self.state.records_sent
        missing = [f"{num_missing} of {total} records"] * (num_missing > 0) + self._unsent
        if not missing:
            return []
        uri, reason = mask_value(self.store.uri), self.problem or "no answer"
        command = f"sylva-ray track {as_argument(self.folder)}"
        return [f"MLflow at {uri} did not receive {', '.join(missing)}: {reason}; send them with: {command}"]

    def _try(self, send: Callable[[], object]) -> bool:
        try:
            send()
        except Exception as error:  # a server, a driver or a proxy may raise anything, and the run must continue
            self.problem = _reason(error, self.store.uri)
            return False
        self.problem = None
        return True

    def _send_records(self) -> list[StageRecord]:
        """Open the run and send the records that it lacks; return all records."""
        self.store.open_run(self.state)
        attacks = [spec.label for spec in self.config.evaluation.specs]
        records = self.folder.load_records()
        for index in range(self.state.records_sent, len(records)):
            time_ms = self._time_ms(records[: index + 1])
            self._log(record_metrics(records[index], attacks), time_ms, records[index].step)
            self.state.update(records_sent=index + 1)
        return records

    def _send_everything(self, status: str) -> None:
        """Send records, summary and the end of the run; then the artifacts, which an ended run still accepts."""
        records = self._send_records()
        summary = self.folder.load_summary()
        if summary is not None:
            self._log(summary_metrics(summary), self._time_ms(records), len(records) - 1)
        evaluation = self.folder.load_evaluation()
        if evaluation is not None:
            self._log(evaluation_metrics(evaluation), self._time_ms(records), len(records) - 1)
        if summary is not None:
            self.store.describe(_description(self.config, summary))
        self.store.end_run(status)
        self._mark_sent("the end of the run")
        for name in self._artifacts():
            path = self.folder.path / name
            if name == FIGURES:
                with tempfile.TemporaryDirectory() as figures:
                    _draw(summary, records, attack_titles(self.config.evaluation.specs), Path(figures))
                    self.store.log_folder(Path(figures), name)
            elif name == CLIENTS and summary is not None:
                self.store.log_table(client_table(summary), name)
            elif name == MODEL:
                with tempfile.TemporaryDirectory() as parent:
                    save_model(self.folder.adapters, summary.num_classes or -1 if summary else -1, Path(parent) / name)
                    self.store.log_folder(Path(parent) / name, name)
            elif path == self.folder.client_tables.folder:
                self.store.log_folder(path, name)
            elif path == self.folder.config_file:
                self.store.log_text(mask_yaml(path.read_text()), name)
            else:
                self.store.log_file(path)
            self._mark_sent(name)
        self.state.update(finished=True)

    def _log(self, values: Mapping[str, float], time_ms: int, step: int) -> None:
        fleet_only = self.config.tracking.detail == "fleet"
        self.store.log_metrics(without_clients(values) if fleet_only else values, time_ms, step)

    def _mark_sent(self, name: str) -> None:
        self._unsent = [other for other in self._unsent if other != name]

    def _artifacts(self) -> list[str]:
        """Return the names of the artifacts to send; the model, which is the largest, comes last."""
        folder = self.folder
        files = [
            folder.config_file,
            folder.client_tables.folder,
            folder.records_file,
            folder.summary_file,
            folder.evaluation_file,
            folder.report_file,
        ]
        names = [path.name for path in files if path.exists()]
        if folder.summary_file.exists():
            names.append(CLIENTS)
        if self.config.tracking.detail == "clients":
            names.append(FIGURES)
            if folder.adapters.exists():
                names.append(MODEL)
        return names

    def _time_ms(self, records: Sequence[StageRecord]) -> int:
        """Return the start of the run plus the wall time of ``records``, in Unix milliseconds."""
        return self.state.started_ms + round(1000 * sum(record.seconds.get("wall", 0.0) for record in records))


def _description(config: ExperimentConfig, summary: Summary) -> str:
    """Return what MLflow shows above a run: its method, its results with their 95 % intervals, and failed checks."""
    titles = attack_titles(config.evaluation.specs)
    final = summary.final
    lines = [
        f"**{summary.algorithm}** on {summary.dataset}, {summary.num_clients} clients.",
        f"Benign accuracy {accuracy_text(summary, final.benign_accuracy)}.",
        *(f"{titles[name]}: {accuracy_text(summary, spread)}." for name, spread in final.robust_accuracy.items()),
        *(f"Check {check.name} failed: {check.meaning}." for check in summary.checks if not check.passed),
    ]
    return "\n\n".join(lines)


def _draw(summary: Summary | None, records: Sequence[StageRecord], titles: Mapping[str, str], folder: Path) -> None:
    """Write the report's figures as PNG files."""
    from sylva_ray.reports.figures.plots import figures  # imports matplotlib, which most of the run does not need
    from sylva_ray.reports.figures.style import png

    for name, figure in figures(summary, records, titles).items():
        (folder / f"{name}.png").write_bytes(png(figure))


def _reason(error: BaseException, uri: str) -> str:
    """Return the start of an exception's message and of its root cause's (connection refused), without credentials."""
    root = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause
    message, root_message = (reason_of(e, uri)[:120] for e in (error, root))
    return message if root_message in message else f"{message} ... ({root_message})"

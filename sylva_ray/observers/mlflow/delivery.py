"""A run folder on its way to a tracking store: what goes, in which order, how far we got, what is still missing.

``rounds.jsonl`` is the truth. Whatever a dead or slow store did not take is tried again after the next record, at the end
of the run, when the run is resumed, and by ``sylva-ray track RUN``; until then it is named in a warning. Sending twice is
harmless: a metric's time is the run's start plus its wall seconds so far, so the store recognises a value it already has.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.credentials import mask_credentials
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Summary
from sylva_ray.observers.mlflow.metrics import evaluation_metrics, record_metrics, summary_metrics, without_clients
from sylva_ray.reports.attack_titles import attack_titles
from sylva_ray.storage.atomic import write_json
from sylva_ray.storage.run_folder import RunFolder

MAX_END_ATTEMPTS, PAUSE_S = 3, 1.0


@dataclass
class DeliveryState:
    """``tracking.json`` in a run folder. It survives crashes of the run; another store starts afresh.

    ``uri`` without credentials. ``key`` tags the store's run. ``started_ms`` (Unix time) is the origin of the metrics'
    times. ``records_sent`` counts the lines of ``rounds.jsonl`` that arrived; ``finished``: the artifacts did, too.
    """

    path: Path
    uri: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_ms: int = field(default_factory=lambda: int(1000 * time.time()))
    experiment_id: str | None = None
    run_id: str | None = None
    records_sent: int = 0
    finished: bool = False

    @classmethod
    def load(cls, folder: RunFolder, uri: str) -> DeliveryState:
        """Return the folder's state if it is about the store ``uri``, else a new one, which is not written yet."""
        path = folder.tracking_file
        try:
            state = cls(path, **json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # none yet, or damaged: the store gets the run again, under a new key
            return cls(path, uri)
        return state if state.uri == uri else cls(path, uri)

    def update(self, **changes: Any) -> None:
        """Change the fields and write the file, in one step for readers."""
        for name, value in changes.items():
            setattr(self, name, value)
        write_json(self.path, {name: value for name, value in asdict(self).items() if name != "path"})


class Store(Protocol):
    """What a delivery asks of a tracking store. Calls may block and may raise anything."""

    uri: str

    def open_run(self, state: DeliveryState) -> None:
        """Find or make the run tagged ``state.key`` and mark it as running; cheap when it is open already."""

    def log_metrics(self, values: Mapping[str, float], time_ms: int, step: int) -> None:
        """Add values at one step."""

    def log_text(self, text: str, name: str) -> None:
        """Add a text file."""

    def log_file(self, path: Path) -> None:
        """Add a file under its own name."""

    def log_folder(self, path: Path, name: str) -> None:
        """Add a folder's files under ``name/``."""

    def end_run(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""


class Delivery:
    """Brings one run folder to one store. Its public methods block as long as the store does, and never raise."""

    def __init__(self, folder: RunFolder, config: ExperimentConfig, store: Store) -> None:
        self.folder, self.config, self.store = folder, config, store
        self.state = DeliveryState.load(folder, mask_credentials(store.uri))
        self.problem: str | None = None
        self._unsent: list[str] = []

    def send_records(self) -> bool:
        """Try to bring the store up to the newest record; returns whether it is."""
        return self._try(self._send_records)

    def expect_end(self) -> None:
        """From now on the end of the run and its artifacts are missing until they are sent."""
        self._unsent = ["the end of the run", *self._artifacts()]

    def finish(self, status: str, abandoned: threading.Event) -> bool:
        """Try, up to three times, to send everything and end the run; returns whether all arrived."""
        self.expect_end()
        for attempt in range(MAX_END_ATTEMPTS):
            if attempt and abandoned.wait(PAUSE_S):
                break
            if self._try(lambda: self._send_everything(status)):
                return True
        return False

    def warnings(self) -> list[str]:
        """One line that names what has not arrived, why, and how to send it; nothing if all did."""
        path = self.folder.records_file
        total = path.read_bytes().count(b"\n") if path.exists() else 0
        missing = total - self.state.records_sent
        parts = [f"{missing} of {total} records"] * (missing > 0) + self._unsent
        if not parts:
            return []
        what, why = ", ".join(parts), self.problem or "no answer"
        again = f"send them with: sylva-ray track {self.folder}"
        return [f"MLflow at {mask_credentials(self.store.uri)} did not take {what}: {why}; {again}"]

    def _try(self, send: Callable[[], object]) -> bool:
        try:
            send()
        except Exception as error:  # whatever a server, a driver or a proxy may throw: the run goes on
            self.problem = mask_credentials(_reason(error))
            return False
        self.problem = None
        return True

    def _send_records(self) -> list[StageRecord]:
        """Open the run and send the records that it lacks; returns all of them."""
        self.store.open_run(self.state)
        attacks = [spec.label for spec in self.config.evaluation.specs]
        records = self.folder.load_records()
        for index in range(self.state.records_sent, len(records)):
            time_ms = self._time_ms(records[: index + 1])
            self._log(record_metrics(records[index], attacks), time_ms, records[index].step)
            self.state.update(records_sent=index + 1)
        return records

    def _send_everything(self, status: str) -> None:
        """Records, summary, the end; then the artifacts, which may be many (an ended run still takes them)."""
        records = self._send_records()
        summary = self.folder.load_summary()
        if summary is not None:
            self._log(summary_metrics(summary), self._time_ms(records), len(records) - 1)
        found = self.folder.load_evaluation()
        if found is not None:
            self._log(evaluation_metrics(found), self._time_ms(records), len(records) - 1)
        self.store.end_run(status)
        self._sent("the end of the run")
        for name in self._artifacts():
            match name:
                case "figures":
                    with tempfile.TemporaryDirectory() as folder:
                        _draw(summary, records, attack_titles(self.config.evaluation.specs), Path(folder))
                        self.store.log_folder(Path(folder), name)
                case "adapters":
                    for client in sorted((self.folder.path / name).iterdir()):
                        self.store.log_folder(client, f"{name}/{client.name}")
                case "config.yaml":
                    self.store.log_text(mask_credentials((self.folder.path / name).read_text()), name)
                case _:
                    self.store.log_file(self.folder.path / name)
            self._sent(name)
        self.state.update(finished=True)

    def _log(self, values: Mapping[str, float], time_ms: int, step: int) -> None:
        fleet_only = self.config.tracking.detail == "fleet"
        self.store.log_metrics(without_clients(values) if fleet_only else values, time_ms, step)

    def _sent(self, name: str) -> None:
        self._unsent = [other for other in self._unsent if other != name]

    def _artifacts(self) -> list[str]:
        """What there is to send, the many adapters last."""
        names = ["config.yaml", "rounds.jsonl", "summary.json", "evaluation.json", "report.html"]
        if self.config.tracking.detail == "clients":
            names += ["figures", "adapters"]
        return [name for name in names if name == "figures" or (self.folder.path / name).exists()]

    def _time_ms(self, records: Sequence[StageRecord]) -> int:
        """Start of the run plus the wall time of ``records``, in Unix milliseconds."""
        return self.state.started_ms + round(1000 * sum(record.seconds.get("wall", 0.0) for record in records))


def _draw(summary: Summary | None, records: Sequence[StageRecord], titles: Mapping[str, str], folder: Path) -> None:
    """The report's figures as PNG files."""
    from sylva_ray.reports.figures.plots import figures  # matplotlib: at the end, or never
    from sylva_ray.reports.figures.style import png

    for name, figure in figures(summary, records, titles).items():
        (folder / f"{name}.png").write_bytes(png(figure))


def _reason(error: BaseException) -> str:
    """An exception's first line, and that of what caused it in the first place ("connection refused")."""
    root = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause
    first, last = (" ".join(str(e).split())[:120] or type(e).__name__ for e in (error, root))
    return first if last in first else f"{first} ... ({last})"

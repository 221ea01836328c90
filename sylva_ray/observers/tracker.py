"""The base class of trackers beside MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.records import StageRecord
from sylva_ray.federation.observer import Observer, Status
from sylva_ray.observers.metrics import record_metrics, summary_metrics, without_clients
from sylva_ray.storage.run_folder import RunFolder


class Tracker(Observer):
    """Turns what happens in a run into metrics (`sylva_ray.observers.metrics`), for a subclass to send somewhere.

    A subclass has `start`, `log` and `finish`. An error that one of them raises is a warning of the run, which goes on
    without the tracker::

        class Printer(Tracker):
            def log(self, values, step):
                print(step, values["loss/mean"])

    Args:
        folder: the run folder.
        config: the experiment.
    """

    def __init__(self, folder: Path, config: ExperimentConfig) -> None:
        self.folder, self.config = folder, config
        self._is_started = False

    def start(self, step: int) -> None:
        """Open the place to which metrics are sent.

        Args:
            step: the first that will be logged: 0, or where the run continues.
        """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send metrics.

        Args:
            values: ``{name: number}``.
            step: of the run, from 0; at the end of a run those of its summary follow with the last step.
        """
        raise NotImplementedError

    def finish(self, status: Status) -> None:
        """Close the place.

        Args:
            status: how the run ended.
        """

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        if not self._is_started:
            self._is_started = True
            self.start(record.step)
        self._step = record.step
        self._log(record_metrics(record, [spec.label for spec in self.config.evaluation.specs]))

    def on_end(self, status: Status) -> list[str]:
        """See `Observer.on_end`. Nothing is sent for a finished run that was resumed, since nothing is new."""
        if self._is_started:
            summary = RunFolder(self.folder).load_summary() if status == "FINISHED" else None
            if summary is not None:
                self._log(summary_metrics(summary))
            self.finish(status)
        return []

    def _log(self, values: Mapping[str, float]) -> None:
        self.log(values if self.config.tracking.detail == "clients" else without_clients(values), self._step)

"""Trackers beside MLflow: the base class, and those that ``tracking.observers`` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.own_code import entry_points_of, load_own
from sylva_ray.core.records import StageRecord
from sylva_ray.core.text import did_you_mean
from sylva_ray.federation.observer import Guarded, Observer, Status
from sylva_ray.observers.metrics import record_metrics, summary_metrics, without_clients
from sylva_ray.storage.run_folder import RunFolder

GROUP = "sylva_ray.observers"
"""The group of entry points."""

TRACKERS = {
    "tensorboard": "sylva_ray.observers.tensorboard:TensorBoard",
    "wandb": "sylva_ray.observers.weights_and_biases:WeightsAndBiases",
}
"""The trackers of this package; each needs the package of its name."""


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


def create_observers(config: ExperimentConfig, folder: Path) -> list[Observer]:
    """Return the observers that ``tracking.observers`` names, guarded: their errors are warnings of the run.

    Args:
        config: the experiment.
        folder: the run folder.

    Raises:
        UserError: as `check_observers`.
    """
    return [Guarded(_find(name)(folder, config)) for name in config.tracking.observers]


def check_observers(names: Sequence[str]) -> None:
    """Check that every observer can be imported.

    Args:
        names: as in ``tracking.observers``.

    Raises:
        UserError: one is unknown, is no subclass of `Observer`, or needs a package that is not installed.
    """
    for name in names:
        _find(name)


def _find(name: str) -> type[Tracker]:
    if name in TRACKERS:
        if find_spec(name) is None:
            fix = f"needs a package that is not installed: pip install 'sylva_ray[{name}]'"
            raise UserError("tracking.observers", name, fix)
        module, _, attribute = TRACKERS[name].partition(":")
        tracker: type[Tracker] = getattr(import_module(module), attribute)
        return tracker
    if ":" not in name and name not in entry_points_of(GROUP):
        fix = f"{did_you_mean(name, TRACKERS)}Known: {', '.join(TRACKERS)}; or package.module:Class"
        raise UserError("tracking.observers", name, fix)
    observer = load_own("tracking.observers", name, GROUP)
    if not (isinstance(observer, type) and issubclass(observer, Observer)):
        raise UserError("tracking.observers", name, "must be a subclass of sylva_ray.federation.observer.Observer")
    return observer  # type: ignore[return-value]

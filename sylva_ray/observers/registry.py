"""Trackers by name; one outside this package is named ``my_package.my_module:MyTracker``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.own_code import find_class
from sylva_ray.federation.observer import Guarded, Observer
from sylva_ray.observers.tensorboard import TensorBoard
from sylva_ray.observers.tracker import Tracker
from sylva_ray.observers.weights_and_biases import WeightsAndBiases

GROUP = "sylva_ray.observers"
"""The group of entry points."""

TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""The trackers of this package by the name of the package that each needs."""


def create_observers(config: ExperimentConfig, folder: Path) -> list[Observer]:
    """Return the observers that ``tracking.observers`` names, guarded: their errors are warnings of the run.

    Args:
        config: the experiment.
        folder: the run folder.

    Raises:
        UserError: as `check_observers`.
    """
    return [Guarded(find_observer(name)(folder, config)) for name in config.tracking.observers]


def check_observers(names: Sequence[str]) -> None:
    """Check that every observer is known, and the package that it needs installed.

    Args:
        names: as in ``tracking.observers``.

    Raises:
        UserError: one is unknown, cannot be imported, is no subclass of `Observer`, or needs a package that is not
            installed. A package that is installed and cannot be imported is a warning of the run.
    """
    for name in names:
        find_observer(name)


def find_observer(name: str) -> Callable[[Path, ExperimentConfig], Observer]:
    """Find the class of an observer.

    Returns:
        It, to be called with the run folder and the configuration.

    Raises:
        UserError: as `check_observers`.
    """
    key = "tracking.observers"
    if name in TRACKERS and find_spec(name) is None:
        raise UserError(key, name, f"needs a package that is not installed: pip install 'sylva_ray[{name}]'")
    return find_class(key, name, "tracker", TRACKERS, GROUP, Observer)  # type: ignore[return-value]

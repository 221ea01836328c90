"""What can be checked of a sweep before Ray is imported."""

from __future__ import annotations

from pathlib import Path

from sylva_ray.config.schema import build
from sylva_ray.config.tracking import TrackingSection
from sylva_ray.observers.mlflow.tracker import tracking_uri
from sylva_ray.observers.registry import check_observers
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.points import check_space, prepare_points
from sylva_ray.sweeps.space import Space


def check_sweep(space: Space, sweep_dir: Path, resume: bool) -> Space:
    """Check what can be checked of a sweep without Ray: its folder, its experiments, and what their values load.

    Args:
        space: the sweep's space.
        sweep_dir: its folder.
        resume: whether the folder must hold the sweep already.

    Returns:
        The space to run, see `SweepFolder.check`.

    Raises:
        UserError: a point is not a valid experiment or cannot run, or the folder is not free. Nothing was written.
    """
    space = SweepFolder(Path(sweep_dir).resolve()).check(space, resume)
    check_space(space)
    section = build(TrackingSection, space.experiment.get("tracking") or {}, "tracking")
    check_observers(section.observers)
    if section.enabled:
        tracking_uri(section, sweep_dir)
    prepare_points(space)
    return space

"""Small spaces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sylva_ray.sweeps.check import check_sweep
from sylva_ray.sweeps.events import OnEvent
from sylva_ray.sweeps.results import Sweep
from sylva_ray.sweeps.space import Space, load_space
from tests.conftest import TINY

SMALL: dict[str, Any] = {
    **TINY,
    "algorithm": {"name": "fedit_at"},
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 1}], "every": 1, "checks": False},
}
"""`TINY` without a phase 2, measured after every round."""


def space_of(folder: Path, experiment: Mapping[str, Any] = SMALL, **keys: Any) -> Space:
    """Write a space to ``folder/space.yaml`` and load it; by default, a grid of two ranks."""
    raw = {"name": "tiny", "experiment": dict(experiment), "parameters": {"lora.rank": {"grid": [1, 2]}}} | keys
    folder.mkdir(exist_ok=True)
    (folder / "space.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return load_space(folder / "space.yaml")


def run_sweep(space: Space, folder: Path, resume: bool, on_event: OnEvent, allow_changed: bool = False) -> Sweep:
    """Check a sweep, then run it or go on with it."""
    from sylva_ray.sweeps.ray_tune import run_checked_sweep

    return run_checked_sweep(check_sweep(space, folder, resume), folder, resume, on_event, allow_changed)


def ignore(event: object) -> None:
    """Take an event of a sweep or of a run."""

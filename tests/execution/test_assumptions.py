"""What was assumed of the GPUs of other machines reaches whoever watches the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sylva_ray.core.errors import RunError
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.preparation.experiment import Prepared
from sylva_ray.storage.run_folder import RunFolder
from tests.execution.conftest import Notices


class WithoutPower(InProcessPool):
    """A pool that runs nothing."""

    def __init__(self) -> None:
        pass

    def run(self, *_: Any, **__: Any) -> Any:
        raise RunError("no power")


def test_a_run_says_what_was_assumed(tiny: Prepared, tmp_path: Path) -> None:
    assert tiny.notices == ()
    prepared, watching = dataclasses.replace(tiny, notices=("cards with 22 GiB are assumed",)), Notices()
    with pytest.raises(RunError, match="no power"):
        run_experiment(prepared, RunFolder(tmp_path), WithoutPower(), watching)
    assert "cards with 22 GiB are assumed" in watching.texts

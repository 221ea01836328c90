"""Precision and attention kernels of a sweep: measured once for all trials, and never for a sweep of version 0.1."""

from __future__ import annotations

from pathlib import Path

import pytest

from sylva_ray.config.experiment import load_config
from sylva_ray.config.training import AttentionKernels
from sylva_ray.models.compute_choice import ComputeChoice
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.ray_tune import choose_compute
from sylva_ray.sweeps.space import Space
from tests.conftest import TINY
from tests.sweeps.test_space import space_of

CHOICE = ComputeChoice("bfloat16", AttentionKernels(bfloat16="plain"), {})


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Space:
    """A space whose experiments leave the choice to a measurement, which finds bfloat16."""
    monkeypatch.setattr("sylva_ray.preparation.resolve.fastest", lambda *_: CHOICE)
    base = TINY | {"training": {"rounds": 1, "batch_size": 16}, "evaluation": {"attacks": []}}
    return space_of(tmp_path, experiment=base, parameters={"lora.rank": {"grid": [1, 2]}})


def test_a_new_sweep_measures_once(space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    folder.claim(space, resume=False)
    choose_compute(folder, space)
    chosen = load_config(folder.compute)
    assert (chosen.training.precision, chosen.training.attention) == ("bfloat16", CHOICE.attention)
    monkeypatch.setattr("sylva_ray.preparation.resolve.fastest", lambda *_: pytest.fail("measured again"))
    choose_compute(folder, space)
    assert load_config(folder.compute) == chosen


def test_a_sweep_of_version_0_1_continues_as_it_began(space: Space, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    folder.claim(space, resume=False)
    folder.trial("0123abcd-s0").path.mkdir()
    choose_compute(folder, space)
    chosen = load_config(folder.compute)
    assert (chosen.training.precision, chosen.training.attention) == ("float32", AttentionKernels())

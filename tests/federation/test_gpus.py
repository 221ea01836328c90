"""The GPUs of a run stand in its records and its summary; several kinds of them are a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.preparation.experiment import Prepared
from tests.federation.runs import records_of, run

L4, H100 = (f"NVIDIA {name}, driver 580.95.05, CUDA 13.2" for name in ("L4", "H100"))


@pytest.mark.slow
def test_a_run_on_cpus_names_none(tiny: Prepared, tmp_path: Path) -> None:
    summary = run(tiny, tmp_path / "run")
    assert summary.hardware is not None
    assert summary.hardware.gpus is None
    assert not any("gpus" in record for record in records_of(tmp_path / "run"))


@pytest.mark.slow
def test_the_gpus_of_all_stages(tiny: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second task and those after it run on another card than the first."""
    cards = iter([L4])
    monkeypatch.setattr(CohortWorker, "gpu", property(lambda _: next(cards, H100), lambda *_: None), raising=False)
    summary = run(tiny, tmp_path / "run")
    assert [record["gpus"] for record in records_of(tmp_path / "run")][:2] == [[H100, L4], [H100]]
    assert summary.hardware is not None
    assert summary.hardware.gpus == [H100, L4]
    assert any(f"{H100}; {L4}" in warning for warning in summary.warnings)

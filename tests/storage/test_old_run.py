"""A run folder that version 0.1 wrote is opened, resumed, evaluated and compared.

``run_of_version_0_1/`` was written by that version: two clients, a warm-up, one round and local epochs. Its
``config.yaml`` has no keys of later versions, its records have no ``compute``, and its measurements in ``evaluation/``
are those of PGD-2 and of randomised smoothing. The gallery was removed from ``evaluation.json``, and adapters, report
and predictions from the folder, to keep it small.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import sylva_ray
from sylva_ray import api
from sylva_ray.core.errors import UserError
from sylva_ray.models import availability
from sylva_ray.models.shipped import SHIPPED, VIT_MICRO_PATCH8, ShippedBackbone
from sylva_ray.storage.run_folder import RunFolder

OLD_RUN = Path(__file__).parent / "run_of_version_0_1"

PARTS_OF_GALLERY = {"3878dc3cd614b295085662521c0d7f2f", "980422ff04e984001f0ad6290c80c339"}
"""Names of the measurements of the gallery, which are not in the folder; FAB finds more than in version 0.1."""


class OldBackbone(ShippedBackbone):
    """The backbone of version 0.1, whose weights are beside the old run."""

    @property
    def checkpoint(self) -> Path:
        return OLD_RUN / "vit_micro_patch8_32.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of the old run, and the weights that were part of its version."""
    monkeypatch.setitem(SHIPPED, "vit_micro_patch8_32", OldBackbone("", VIT_MICRO_PATCH8))
    monkeypatch.setattr(availability, "RETIRED", {})
    return RunFolder(shutil.copytree(OLD_RUN, tmp_path / "run"))


def test_it_opens(folder: RunFolder) -> None:
    """What 0.1 did not write has the value that 0.1 computed with."""
    run = sylva_ray.load_run(folder.path)
    assert [record.stage for record in run.records] == ["warmup", "phase1", "personalise"]
    assert all(record.compute is None for record in run.records)
    assert run.summary is not None
    assert run.summary.compute is None
    assert run.evaluation is not None
    assert run.evaluation.attacks["pgd2-eps4"].settings.steps == 2
    assert run.config.evaluation.precision == "float32"
    assert len(run.states) == 2


def test_without_its_weights_it_says_where_they_are_and_takes_them(tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(OLD_RUN, tmp_path / "run"))
    folder.summary_file.unlink()
    with pytest.raises(UserError, match=r"set backbone\.checkpoint to its file in sylva_ray/assets/ of that version"):
        sylva_ray.resume(folder.path, show="nothing")
    weights = OLD_RUN / "vit_micro_patch8_32.safetensors"
    text = folder.config_file.read_text()
    folder.config_file.write_text(text.replace("  checkpoint: null", f"  checkpoint: {weights}"))
    assert sylva_ray.resume(folder.path, show="nothing").rounds == 1


def test_it_resumes(folder: RunFolder) -> None:
    """The last stage is computed again from the checkpoint before it, with the random numbers of this version."""
    expected = folder.load_states()
    shutil.rmtree(folder.checkpoints.root / "round_0002")
    before = folder.load_states()
    folder.summary_file.unlink()
    summary = sylva_ray.resume(folder.path, show="nothing")
    assert summary.rounds == 1
    assert [record.stage for record in folder.load_records()] == ["warmup", "phase1", "personalise"]
    for state, other, start in zip(folder.load_states(), expected, before, strict=True):
        assert state.keys() == other.keys()
        names = [name for name in state if not np.array_equal(other[name], start[name])]
        moved, once = (np.concatenate([(own[n] - start[n]).ravel() for n in names]) for own in (state, other))
        assert moved @ once > 0.5 * np.linalg.norm(moved) * np.linalg.norm(once), "it goes the way that it went"
    assert folder.adapter(1).exists()


@pytest.mark.long
def test_its_measurements_are_found_again(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is measured but the gallery."""
    sylva_ray.export(folder.path, folder.adapters)
    before = folder.load_evaluation()
    names = {path.stem for path in folder.measurements.iterdir()}
    found = sylva_ray.evaluate(folder.path, ["pgd:steps=2,epsilon=4/255"], certify=[0.1], show="nothing")
    assert {path.stem for path in folder.measurements.iterdir()} == names | PARTS_OF_GALLERY
    assert "it cannot be checked that data and weights are the same" in capsys.readouterr().err
    assert not folder.inputs_file.exists()
    assert before is not None
    for key in ("per_class", "majority", "worst_case", "certified"):
        assert getattr(found, key) == getattr(before, key), key
    assert found.benign.interval == pytest.approx(before.benign.interval), "as many images of each client"
    assert found.benign == before.benign.model_copy(update={"interval": found.benign.interval})
    assert found.attacks["pgd2-eps4"].accuracy == before.attacks["pgd2-eps4"].accuracy


def test_it_is_compared_and_reported(folder: RunFolder) -> None:
    """A summary of 0.1 has all that a comparison needs."""
    rows = sylva_ray.compare([folder.path], show="nothing")
    assert "sylva" in {row.method for row in rows}
    assert "PGD" in api.report(folder.path).read_text()

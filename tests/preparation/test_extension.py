"""Rounds that are added to a run: the same bits as a run that had them from the start, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sylva_ray
from sylva_ray import testing
from sylva_ray.core.errors import UserError
from sylva_ray.storage.run_folder import ADAPTER_FILES, EXPORT_FILES, RunFolder
from tests.preparation.test_inputs import draw_images
from tests.storage.conftest import contents

pytestmark = pytest.mark.long

CONFIG: dict[str, Any] = testing.TINY | {
    "algorithm": {"name": "fedavg_at", "model": "lora"},
    "training": testing.TINY["training"] | {"rounds": 1, "lr_schedule": "constant"},
}
LONGER = ["training.rounds=3"]


def made(folder: Path, *overrides: str, config: dict[str, Any] = CONFIG) -> Path:
    sylva_ray.run(config, list(overrides), out=folder, show="nothing")
    return folder


def assert_equal_ends(one: Path, other: Path) -> None:
    first, second = sylva_ray.load_run(one), sylva_ray.load_run(other)
    for before, after in zip(first.states, second.states, strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert first.summary is not None
    assert second.summary is not None
    assert first.summary.final == second.summary.final
    assert [record.stage for record in first.records] == [record.stage for record in second.records]
    for mine, theirs in zip(first.records, second.records, strict=True):
        assert (mine.lr, mine.epsilon, mine.metrics) == (theirs.lr, theirs.epsilon, theirs.metrics)


@pytest.mark.parametrize(
    ("schedule", "goes_on_with"), [("constant", 3), pytest.param("cosine", 2, marks=pytest.mark.slow)]
)
def test_a_finished_run_with_more_rounds_is_the_run_that_had_them_from_the_start(
    schedule: str, goes_on_with: int, tmp_path: Path
) -> None:
    """The second of two rounds has another learning rate on a cosine over three, so it is trained again."""
    overrides = [f"training.lr_schedule={schedule}"]
    extended = made(tmp_path / "extended", *overrides, "training.rounds=2")
    sylva_ray.resume(extended, LONGER, show="nothing")
    assert_equal_ends(extended, made(tmp_path / "whole", *overrides, *LONGER))
    before = [record.extended_from for record in sylva_ray.load_run(extended).records]
    assert before == [2 if step == goes_on_with else None for step in range(4)]
    assert sylva_ray.load_run(extended).config.training.rounds == 3
    sylva_ray.resume(extended, show="nothing")  # it has finished
    sylva_ray.report(extended)


def test_stages_after_the_last_round_do_not_take_its_checkpoint(tmp_path: Path) -> None:
    """A local epoch follows, and only the newest checkpoint is kept besides."""
    overrides = ["algorithm.name=fedavg_at_ft", "algorithm.epsilon_warmup=0", "cluster.keep_checkpoints=1"]
    extended = made(tmp_path / "extended", *overrides)
    assert len(RunFolder(extended).checkpoints.steps()) == 2
    sylva_ray.resume(extended, ["training.rounds=2"], show="nothing")
    assert_equal_ends(extended, made(tmp_path / "whole", *overrides, "training.rounds=2"))
    assert len(RunFolder(extended).checkpoints.steps()) == 2


def test_a_checkpoint_that_is_gone_is_no_fault_of_the_schedule(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "training.rounds=2")
    for step in RunFolder(run).checkpoints.steps():
        RunFolder(run).checkpoints.remove(step)
    with pytest.raises(UserError, match="was deleted"):
        sylva_ray.resume(run, LONGER, show="nothing")


def test_a_process_that_ends_in_the_middle_leaves_a_run_of_as_many_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path / "run")
    before = sylva_ray.load_run(run)
    with monkeypatch.context() as patch:
        patch.setattr("sylva_ray.storage.run_folder.write_marker", lambda *_, **__: exit())
        with pytest.raises(SystemExit):
            sylva_ray.resume(run, LONGER, show="nothing")
    sylva_ray.resume(run, show="nothing")
    again = sylva_ray.load_run(run)
    assert again.summary is not None
    assert before.summary is not None
    assert again.summary.final == before.summary.final
    assert [record.extended_from for record in again.records] == [None, None]
    sylva_ray.resume(run, LONGER, show="nothing")
    assert len(sylva_ray.load_run(run).records) == 4


@pytest.mark.parametrize(
    ("overrides", "asked", "says"),
    [
        (
            ["training.lr_schedule=cosine", "training.rounds=2", "cluster.keep_checkpoints=1"],
            ["training.rounds=3"],
            "was deleted .*lr_schedule=cosine",
        ),
        (
            ["training.rounds=2", "cluster.keep_checkpoints=1"],
            ["training.rounds=12"],
            "already its first one would be another.*epsilon_warmup=0",
        ),
        (["training.rounds=2"], ["training.rounds=1"], "can get more, not fewer"),
        (["training.rounds=2"], ["training.rounds=3", "training.lr=0.1"], r"training\.lr = '0\.1'.*has another config"),
    ],
)
def test_what_cannot_be_extended_is_refused_and_stays(
    overrides: list[str], asked: list[str], says: str, tmp_path: Path
) -> None:
    run = made(tmp_path / "run", *overrides)
    config = (run / "config.yaml").read_text()
    with pytest.raises(UserError, match=says):
        sylva_ray.resume(run, asked, show="nothing")
    assert (run / "config.yaml").read_text() == config
    assert RunFolder(run).load_finished() is not None
    assert not (run / "extensions.json").exists()


def test_a_run_whose_exported_files_are_gone_has_not_finished(tmp_path: Path) -> None:
    """Also where only files are gone, and their folders are there; a resume writes them again."""
    run = made(tmp_path / "run")
    folder = RunFolder(run)
    paths = [*(folder.adapters / name for name in EXPORT_FILES), *(folder.adapter(1) / name for name in ADAPTER_FILES)]
    for path in paths:
        content = path.read_bytes()
        path.unlink()
        assert folder.load_finished() is None, path
        path.write_bytes(content)
    assert folder.load_finished() is not None
    paths[-2].unlink()
    sylva_ray.resume(run, show="nothing")
    assert folder.load_finished() is not None


def test_nothing_is_deleted_for_a_run_that_cannot_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "run")

    def lost(_: object) -> None:
        raise UserError("dataset.name", "digits", "no such folder")

    with monkeypatch.context() as patch:
        patch.setattr("sylva_ray.preparation.experiment.find_dataset", lost)
        with pytest.raises(UserError, match="no such folder"):
            sylva_ray.resume(run, LONGER, show="nothing")
    assert RunFolder(run).load_finished() is not None
    assert sylva_ray.load_run(run).config.training.rounds == 1


def test_more_rounds_in_the_file_alone_are_not_accepted(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("rounds: 1", "rounds: 3"))
    with pytest.raises(UserError, match="is not the config of the run's checkpoints"):
        sylva_ray.resume(run, show="nothing")


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"before": 1, "rounds": 3}]', "["])
def test_a_damaged_list_of_extensions_is_named(content: str, tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    (run / "extensions.json").write_text(content)
    with pytest.raises(UserError, match="extension"):
        sylva_ray.resume(run, LONGER, show="nothing")


def test_nothing_is_deleted_for_other_data(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 40)
    dataset = {"name": f"imagefolder:{tmp_path / 'images'}", "max_train": None, "max_test": None}
    run = made(tmp_path / "run", config=CONFIG | {"dataset": dataset})
    before = contents(run)
    draw_images(tmp_path / "images", 40, seed=1)
    with pytest.raises(UserError, match="are not those of the run"):
        sylva_ray.resume(run, LONGER, show="nothing")
    assert contents(run) == before
    sylva_ray.resume(run, LONGER, allow_changed=True, show="nothing")
    assert len(sylva_ray.load_run(run).records) == 4


def test_a_repair_keeps_rounds_that_were_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that ended before its first new stage; its checkpoint has the settings of the shorter one."""
    run = made(tmp_path / "run", "algorithm.epsilon_warmup=0")
    with monkeypatch.context() as patch:
        patch.setattr("sylva_ray.execution.run.run_experiment", lambda *_: exit())
        with pytest.raises(SystemExit):
            sylva_ray.resume(run, LONGER, show="nothing")
    assert sylva_ray.repair(run) == []
    assert sylva_ray.load_run(run).config.training.rounds == 3

"""What a run folder holds is what was written, or one line says what is wrong and what to do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save
from typer.testing import CliRunner

import sylva_ray
from sylva_ray.cli import app
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import stack_states
from sylva_ray.storage.checkpoint import CheckpointFolder
from sylva_ray.storage.manifest import write_manifest
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.federation.runs import bare_record
from tests.storage.conftest import ONE_PHASE, contents

pytestmark = pytest.mark.long

# -- config.yaml -------------------------------------------------------------------------------------------------------


def test_a_resume_does_not_write_the_config(finished: RunFolder) -> None:
    """Other actors and another tracker are used, and not written."""
    shutil.rmtree(finished.checkpoints.root / "round_0002")
    before = contents(finished.path)["config.yaml"]
    sylva_ray.resume(finished.path, ["cluster.max_task_retries=7", "tracking.experiment=other"], show="nothing")
    assert contents(finished.path)["config.yaml"] == before


def test_a_resume_keeps_the_order_of_attacks(tmp_path: Path) -> None:
    """The first attack is the one that tables show; here the resume has all accuracies from the checkpoint."""
    attacks = [{"name": "pgd", "epsilon": "4/255", "steps": 1}, {"name": "fgsm", "epsilon": "4/255"}]
    folder = RunFolder(tmp_path / "run")
    sylva_ray.run(ONE_PHASE | {"evaluation": {"attacks": attacks, "checks": False}}, out=folder.path, show="nothing")
    summary = folder.load_summary()
    assert summary is not None
    folder.summary_file.unlink()
    resumed = sylva_ray.resume(folder.path, show="nothing")
    assert list(resumed.final.robust_accuracy) == list(summary.final.robust_accuracy)
    assert [label.partition("-")[0].rstrip("0123456789") for label in summary.final.robust_accuracy] == ["pgd", "fgsm"]


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_full_disk_at_the_start_leaves_nothing(
    fails: str, tiny_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    target = {"write": (Path, "replace"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[fails]
    monkeypatch.setattr(*target, full)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="No space left"), folder.locked():
        folder.claim(tiny_config, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_the_config_is_on_the_disk_before_its_folder_counts(
    tiny_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    RunFolder(tmp_path / "run").claim(tiny_config, resume=False)
    assert [Path(path).name for path in synced] == [".config.yaml", "run"]


def test_a_start_that_was_killed_before_it_had_a_config_can_be_repeated(
    tiny_config: ExperimentConfig, tmp_path: Path
) -> None:
    (tmp_path / ".config.yaml").write_text("name: ha")
    (tmp_path / ".lock").write_text("{}")
    RunFolder(tmp_path).claim(tiny_config, resume=False)
    assert RunFolder(tmp_path).load_config() == tiny_config


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "blank": lambda path: path.write_text(" \n\n"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:700]),
    "binary": lambda path: path.write_bytes(b"\x00\xff\x00"),
    "rounds": lambda path: path.write_text(path.read_text().replace("rounds: 1", "rounds: 2")),
    "rank": lambda path: path.write_text(path.read_text().replace("rank: 2", "rank: 4")),
    "clients": lambda path: path.write_text(path.read_text().replace("num_clients: 3", "num_clients: 4")),
    "seed": lambda path: path.write_text(path.read_text().replace("seed: 0", "seed: 1")),
    "epsilon": lambda path: path.write_text(path.read_text().replace("epsilon: 0.0156", "epsilon: 0.0157")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_config_that_is_not_the_runs_is_refused_by_every_command_and_restored(
    damage: str, finished: RunFolder
) -> None:
    original = finished.config_file.read_bytes()
    states = finished.load_states()
    DAMAGES[damage](finished.config_file)
    assert not finished.config_file.exists() or finished.config_file.read_bytes() != original
    before = contents(finished.path)
    run = str(finished)
    for arguments in (
        ["run", run, "--resume"],
        ["evaluate", run],
        ["export", run, "--to", f"{run}-out"],
        ["report", run],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, arguments
        assert len(result.stderr.splitlines()) == 1
        assert f"sylva-ray repair {run}" in result.stderr
    assert contents(finished.path) == before
    result = CliRunner().invoke(app, ["repair", run])
    assert result.exit_code == 0
    assert result.stdout.startswith("config.yaml: ")
    restored, config = finished.load_config(), ExperimentConfig.model_validate(yaml.safe_load(original))
    assert restored.model_dump(exclude={"cluster", "tracking"}) == config.model_dump(exclude={"cluster", "tracking"})
    assert all(np.array_equal(a[n], b[n]) for a, b in zip(states, finished.load_states(), strict=True) for n in a)
    assert not restored.tracking.enabled, "the run was not tracked"
    assert CliRunner().invoke(app, ["repair", run]).stdout == "nothing to repair\n"
    before = contents(finished.path)
    sylva_ray.resume(run, show="nothing")
    assert contents(finished.path) == before


def test_a_repair_keeps_the_sections_that_no_result_depends_on(finished: RunFolder) -> None:
    text = finished.config_file.read_text().replace("max_task_retries: 3", "max_task_retries: 9")
    finished.config_file.write_text(text.replace("seed: 0", "seed: 5"))
    (done,) = sylva_ray.repair(finished.path)
    assert "seed: 0 there, 5 now" in done
    assert "cluster and tracking as they were" in done
    config = finished.load_config()
    assert (config.seed, config.cluster.max_task_retries, config.tracking.enabled) == (0, 9, False)


def test_a_repair_restores_records_and_sets_unreadable_results_aside(finished: RunFolder) -> None:
    records = finished.load_records()
    finished.records_file.write_text("{}\n")
    finished.summary_file.write_text("{")
    (finished.path / ".summary.json").write_text("{")
    (finished.checkpoints.root / "round_0003").mkdir()
    done = sylva_ray.repair(finished.path)
    assert [line.partition(":")[0] for line in done] == [
        ".summary.json",
        "rounds.jsonl",
        "round_0003",
        "continue with",
        "summary.json",
    ]
    assert finished.load_records() == records
    assert (finished.path / "summary.json.damaged").exists()
    summary = sylva_ray.resume(finished.path, show="nothing")
    assert summary == finished.load_summary()


def test_nothing_is_restored_from_nothing(tmp_path: Path, finished: RunFolder) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        sylva_ray.repair(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    shutil.rmtree(finished.checkpoints.root)
    with pytest.raises(UserError, match="has no checkpoint"):
        sylva_ray.repair(finished.path)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def small(folder: Path, *steps: int) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder)
    for step in steps:
        checkpoints.save(step, [{"a": np.full(2, step, np.float32)}] * 2, [bare_record(step)], None)
    return checkpoints


def test_more_than_9999_steps_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    checkpoints = small(tmp_path, *range(9_998, 10_003))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_10000", "round_10001", "round_10002"]
    for step in (10_002, 10_001, 10_000):
        newest = checkpoints.latest()
        assert newest is not None
        assert (newest.step, newest.states[1]["a"].tolist()) == (step, [step, step])
        shutil.rmtree(tmp_path / f"round_{step}")
    mixed = small(tmp_path, 9_998, 9_999, 10_000).latest()
    assert mixed is not None
    assert mixed.step == 10_000


def reseal(folder: Path, **changes: Any) -> None:
    """Write the manifest of a folder again, with the checksums of its files."""
    files = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"}
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    manifest = {"step": int(folder.name.removeprefix("round_")), "sha256": sums} | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


MANIFESTS: dict[str, Any] = {
    "no files": {"sha256": {}},
    "no states": {"sha256": {"progress.json": "0" * 64}},
    "checksums of a wrong type": {"sha256": {"states.safetensors": 1, "progress.json": "0"}},
    "a list of files": {"sha256": ["states.safetensors"]},
    "another step": {"step": 3},
    "a negative step": {"step": -1},
    "a step that is no number": {"step": "1"},
    "a step that is a truth value": {"step": True},
    "a key of its own": {"more": 1},
    "a file outside": {"sha256": {"states.safetensors": "0", "progress.json": "0", "../../config.yaml": "0"}},
    "an absolute path": {"sha256": {"states.safetensors": "0", "progress.json": "0", "/etc/passwd": "0"}},
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_nobody_wrote_is_refused(case: str, tmp_path: Path) -> None:
    checkpoints = small(tmp_path, 0, 1)
    reseal(tmp_path / "round_0001", **MANIFESTS[case])
    with pytest.raises(UserError, match=r"round_0001/manifest\.json") as caught:
        checkpoints.latest()
    assert len(str(caught.value).splitlines()) == 1


def change_states(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change states that are written as one row per client, as where clients share nothing."""
    newest = CheckpointFolder(folder.parent).latest()
    assert newest is not None
    arrays = stack_states(newest.states)
    for path in (*folder.glob("places.safetensors"), *folder.glob("rows_*")):
        path.unlink()
    change(arrays)
    (folder / "states.safetensors").write_bytes(save(arrays))
    reseal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_client_and_array(value: float, tmp_path: Path) -> None:
    checkpoints = small(tmp_path, 0, 1)
    change_states(tmp_path / "round_0001", lambda arrays: arrays["a"].__setitem__((0, 0), value))
    with pytest.raises(UserError, match="the array 'a' of client 0 is not finite"):
        checkpoints.latest()


def leave_out_a_client(arrays: dict[str, np.ndarray]) -> None:
    arrays |= {name: value[:2].copy() for name, value in arrays.items()}


def double(arrays: dict[str, np.ndarray]) -> None:
    name = next(iter(arrays))
    arrays[name] = arrays[name].astype(np.float64)


STATES: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "another name": (
        lambda arrays: arrays.__setitem__("x", arrays.pop("head.bias")),
        "'head.bias' of client 0 is missing",
    ),
    "another array": (lambda arrays: arrays.__setitem__("x", arrays["head.bias"]), "'x' of client 0 is float32"),
    "another shape": (
        lambda arrays: arrays.__setitem__("head.bias", arrays["head.bias"][:, :4].copy()),
        r"'head.bias' of client 0 is float32 \[4\] there, and float32 \[10\] in this run",
    ),
    "another type": (double, "is float64 .* there, and float32"),
    "another number of clients": (
        leave_out_a_client,
        "partition.num_clients = 3: .* holds 2 clients",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_another_form_are_refused(case: str, finished: RunFolder) -> None:
    change, says = STATES[case]
    shutil.rmtree(finished.checkpoints.root / "round_0002")
    change_states(finished.checkpoints.root / "round_0001", change)
    with pytest.raises(UserError, match=says):
        sylva_ray.resume(finished.path, show="nothing")


def test_records_of_other_stages_are_refused(finished: RunFolder) -> None:
    folder = finished.checkpoints.root / "round_0002"
    progress = json.loads((folder / "progress.json").read_text())
    finished.summary_file.unlink()
    for records in (progress["records"][:2], progress["records"][::-1]):
        (folder / "progress.json").write_text(json.dumps(progress | {"records": records}))
        reseal(folder)
        with pytest.raises(UserError, match="records are not of the first 3 stages"):
            sylva_ray.resume(finished.path, show="nothing")


def test_a_header_that_claims_everything_is_refused_at_once(tmp_path: Path) -> None:
    checkpoints = small(tmp_path, 0)
    (tmp_path / "round_0000" / "states.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    reseal(tmp_path / "round_0000")
    with pytest.raises(UserError, match="is not a safetensors file"):
        checkpoints.latest()


def test_a_newest_checkpoint_that_was_damaged_is_computed_again_and_not_read_past(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export of the stage before it would be another model without a word."""
    expected = contents(finished.adapters)
    path = finished.checkpoints.root / "round_0002" / "states.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"round_0002: states\.safetensors does not match its checksum"):
        sylva_ray.load_run(finished.path)
    sylva_ray.resume(finished.path)
    assert "checkpoint round_0002: states.safetensors does not match its checksum; the run continues" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    assert path.read_bytes() == content
    assert {n: c for n, (c, _) in contents(finished.adapters).items()} == {n: c for n, (c, _) in expected.items()}


def test_equal_runs_write_equal_checkpoints(finished: RunFolder, tmp_path: Path) -> None:
    """Also with another tracker and other actors."""
    overrides = ["tracking.tags.note=other", "cluster.max_task_retries=1"]
    sylva_ray.run(finished.load_config(overrides), out=tmp_path / "other", show="nothing")
    for step in (0, 1, 2):
        for name in ("states.safetensors", "config.json"):
            paths = [run / "checkpoint" / f"round_000{step}" / name for run in (finished.path, tmp_path / "other")]
            assert paths[0].read_bytes() == paths[1].read_bytes()


# -- finished runs -----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_read_only_to_a_resume(finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither data nor weights are needed."""
    monkeypatch.setattr("sylva_ray.preparation.experiment.find_dataset", lambda *_: pytest.fail("loads data"))
    before = contents(finished.path)
    result = CliRunner().invoke(app, ["run", str(finished), "--resume"])
    assert result.exit_code == 0, result.stderr
    assert f"{finished} has finished: nothing is computed or written again" in result.stdout.replace("\n", " ")
    assert contents(finished.path) == before
    assert sylva_ray.resume(finished.path, config=ONE_PHASE, show="nothing") == finished.load_summary()
    assert contents(finished.path) == before
    with pytest.raises(UserError, match=r"lora\.rank: 2 there, 3 now"):
        sylva_ray.resume(finished.path, ["lora.rank=3"], show="nothing")
    other = ONE_PHASE | {"attack": TINY["attack"] | {"steps": 9}}
    with pytest.raises(UserError, match=r"attack\.steps: \d+ there, 9 now"):
        sylva_ray.resume(finished.path, config=other, show="nothing")


@pytest.mark.parametrize("lost", ["report.html", "adapters/client_001", "rounds.jsonl"])
def test_what_a_finished_run_has_lost_is_written_again_and_the_rest_kept(lost: str, finished: RunFolder) -> None:
    path = finished.path / lost
    before, records = contents(finished.path), finished.load_records()
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    sylva_ray.resume(finished.path, show="nothing")
    after = contents(finished.path)
    assert after.keys() == before.keys()
    assert after["summary.json"] == before["summary.json"]
    assert finished.load_records() == records
    written_again = ("report.html", "rounds.jsonl", "run.log")
    assert all(after[name][0] == before[name][0] for name in before if name not in written_again)


# -- compare -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: run.config_file.write_text(run.config_file.read_text().replace("seed: 0", "seed: 7")), "seed"),
        (lambda run: run.config_file.unlink(), "config.yaml"),
        (lambda run: run.config_file.write_text(""), "config.yaml"),
    ],
    ids=["edited", "removed", "emptied"],
)
def test_a_comparison_refuses_a_config_that_is_not_the_runs(
    change: Callable[[RunFolder], object], says: str, finished: RunFolder
) -> None:
    change(finished)
    result = CliRunner().invoke(app, ["compare", str(finished.path)])
    assert result.exit_code == 2
    assert says in result.stderr
    assert f"sylva-ray repair {finished.path}" in " ".join(result.stderr.split())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"benign": NaN}', "{"])
@pytest.mark.parametrize("command", ["compare", "report", "evaluate"])
def test_a_summary_that_is_no_json_is_refused_before_anything_is_computed(
    command: str, text: str, finished: RunFolder
) -> None:
    finished.summary_file.write_text(text)
    before = contents(finished.path)
    result = CliRunner().invoke(app, [command, str(finished.path)])
    assert result.exit_code == 2
    assert "is not JSON" in " ".join(result.stderr.split())
    assert contents(finished.path) == before


def test_settings_that_are_not_those_of_their_checkpoint_are_not_restored(finished: RunFolder) -> None:
    """Its checksums fit, but the settings name ten clients, and the states are those of fewer."""
    step = finished.checkpoints.steps()[-1]
    folder = finished.checkpoints.root / f"round_{step:04d}"
    (folder / "config.json").write_text("{}")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(write_manifest(step, files))
    before = contents(finished.path)
    with pytest.raises(UserError, match="holds the settings of 10 clients and the states of"):
        sylva_ray.repair(finished.path)
    assert contents(finished.path) == before


def test_a_comparison_reads_no_states(finished: RunFolder) -> None:
    """They may be gigabytes."""
    step = finished.checkpoints.steps()[-1]
    (finished.checkpoints.root / f"round_{step:04d}" / "states.safetensors").write_bytes(b"")
    assert CliRunner().invoke(app, ["compare", str(finished.path)]).exit_code == 0

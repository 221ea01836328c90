"""The Python interface: what a notebook calls."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

import sylva_ray.api
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.federation.observer import Observer
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.reports.synthetic_run import make_run
from tests.test_architecture import ROOT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished run and what `sylva_ray.run` returned; what it printed lies beside the folder."""
    folder = tmp_path_factory.mktemp("api") / "run"
    with (folder.parent / "stdout").open("w") as stdout, redirect_stdout(stdout):
        return folder, sylva_ray.run(TINY, ["training.rounds=1"], out=folder, show="tasks", log_format="json")


def test_json_lines_tell_every_event_of_a_run(run: tuple[Path, Any]) -> None:
    folder, summary = run
    events = [json.loads(line) for line in (folder.parent / "stdout").read_text().splitlines()]
    records = [event for event in events if event["event"] == "record"]
    assert [event["stage"] for event in records] == [record.stage for record in sylva_ray.load_run(folder).records]
    assert [event["step"] for event in records] == list(range(len(records)))
    assert {event["steps"] for event in records} == {len(records)}
    assert [event["title"] for event in events if event["event"] == "stage"][1] == "phase 1: round 1 of 1"
    for event in events:
        if event["event"] == "task":
            assert 0 < event["done"] <= event["total"] <= 3, "no more clients than the fleet has"
    assert events[-1]["event"] == "result"
    assert events[-1]["run"] == str(folder)
    assert events[-1]["benign_accuracy"] == summary.final.benign_accuracy.mean
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert times == sorted(times)


def test_a_run_folder_holds_a_log_of_what_happened_when(run: tuple[Path, Any]) -> None:
    lines = (run[0] / "run.log").read_text().splitlines()
    assert all(datetime.fromisoformat(line.split("  ")[0]) for line in lines)
    steps = len(sylva_ray.load_run(run[0]).records)
    assert [f"{step}/{steps}" in line for step in range(1, steps + 1) for line in lines].count(True) == steps
    assert any("train: 3 of 3 clients" in line for line in lines)


def test_every_public_name_exists() -> None:
    assert all(getattr(sylva_ray, name) for name in sylva_ray.__all__)
    assert set(sylva_ray.__all__) <= set(dir(sylva_ray))
    assert sylva_ray.__all__ == sylva_ray.api.__all__
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        sylva_ray.rum  # noqa: B018


def test_only_settings_are_read_about() -> None:
    """An error's key may be a word of ours: that of a damaged checkpoint is no setting of the backbone."""
    assert sylva_ray.where_to_read("class_balance") == " (more: sylva-ray show algorithm.class_balance)"
    assert sylva_ray.where_to_read("attack.epsilon") == " (more: sylva-ray show attack.epsilon)"
    assert not any(map(sylva_ray.where_to_read, ("checkpoint", "clients", "kind", "file")))


def test_a_run_returns_its_summary(run: tuple[Path, Any]) -> None:
    folder, summary = run
    assert summary.to_json() == json.loads((folder / "summary.json").read_text())
    loaded = sylva_ray.load_run(folder)
    assert loaded.summary == summary
    assert loaded.config.training.rounds == 1
    assert len(loaded.states) == 3
    assert [record.step for record in loaded.records] == list(range(len(loaded.records)))
    assert loaded.evaluation is None


def test_a_finished_run_resumes_to_the_same_accuracies(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, summary = run
    again = sylva_ray.resume(folder, show="result")
    assert again.final == summary.final
    assert f"run      {folder}" in capsys.readouterr().out


def test_evaluation_export_and_comparison(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    found = sylva_ray.evaluate(folder, ["fgsm"], images=4, out=tmp_path / "found.json", show="nothing")
    assert json.loads(json.dumps(found.to_json())) == json.loads((tmp_path / "found.json").read_text())
    assert [path.name for path in sylva_ray.export(folder, tmp_path / "out", [2, 0], show="nothing")] == [
        "client_002",
        "client_000",
    ]
    with pytest.raises(UserError, match="clients = 3: must be 0 to 2"):
        sylva_ray.export(folder, tmp_path / "out", [3])
    rows = sylva_ray.compare([folder], out=[tmp_path / "table.md"], show="nothing")
    assert {row.stage for row in rows} >= {"final"}
    assert (tmp_path / "table.md").exists()
    assert capsys.readouterr().out == "", "show='nothing' prints nothing"


def test_a_config_is_a_file_a_folder_a_mapping_or_checked_already(
    run: tuple[Path, Any], tiny_config: ExperimentConfig
) -> None:
    folder, _ = run
    assert sylva_ray.load_config(TINY) == tiny_config == sylva_ray.load_config(tiny_config)
    assert sylva_ray.load_config(tiny_config, ["seed=3"]).seed == 3
    assert sylva_ray.load_config(folder).training.rounds == 1
    assert sylva_ray.load_config(TINY, ["lora.rank=3"]).lora.rank == 3
    assert TINY["lora"] == {"rank": 2}, "the caller's mapping is left as it is"
    with pytest.raises(UserError, match="did you mean 'attack'"):
        sylva_ray.load_config(TINY, ["atack.epsilon=0.1"])


def test_an_interface_call_works_outside_the_main_thread(run: tuple[Path, Any]) -> None:
    """Signals cannot be handled there."""
    folder, summary = run
    found = []
    thread = threading.Thread(target=lambda: found.append(sylva_ray.resume(folder, show="nothing")))
    thread.start()
    thread.join()
    assert found[0].final == summary.final


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attacks": ["pdg"]}, "--attack = 'pdg': unknown attack; did you mean 'pgd'"),
        ({"suite": "quik"}, "--suite = 'quik': unknown suite; did you mean 'quick'"),
        ({"certify": ["a"]}, "--certify = 'a': must be a number above 0"),
        ({"epsilon": "banana"}, "--epsilon = 'banana': must be a number or a fraction such as 4/255"),
    ],
)
def test_a_wrong_request_is_refused_before_data_and_model_are_loaded(
    run: tuple[Path, Any], options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("nothing is loaded")

    monkeypatch.setattr("sylva_ray.evaluation.run.prepare", load)
    with pytest.raises(UserError) as caught:
        sylva_ray.evaluate(run[0], **options)
    assert str(caught.value).startswith(says)


def test_the_callback_of_the_documentation_sees_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "own_parts.md").read_text()
    (code,) = re.findall(r"^```python\n(import sylva_ray\n.*?)^```", text, re.M | re.S)
    make_run(tmp_path)
    records = RunFolder(tmp_path).load_records()

    def run(config: str, *, out: str, observer: Observer) -> None:
        del config, out
        for record in records:
            observer.on_record(record)

    monkeypatch.setattr("sylva_ray.api.run", run)
    names: dict[str, Any] = {}
    exec(compile(code, "own_parts.md", "exec"), names)
    assert list(names["losses"].seen) == [record.step for record in records if record.metrics.get("loss")] != []


def test_the_python_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smaller experiment in place of ``configs/digits.yaml``."""
    (code,) = re.findall(r"^```python\n(import sylva_ray\n.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.yaml").write_text(yaml.safe_dump(TINY | {"algorithm": {"name": "undefended"}}))
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["summary"].rounds == 5
    assert list(names["evaluation"].attacks) == ["pgd10-eps4"], "that of the run"
    assert [folder.name for folder in names["folders"]] == ["client_000"]
    assert (tmp_path / "runs" / "five.html").exists()
    (loading,) = re.findall(r"^```python\n(import runpy\n.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    given = "import sys, torch\nsys.modules['sylva_ray'] = None\nimages = torch.rand(2, 3, 32, 32)\n"
    command = [sys.executable, "-c", given + loading + "print(*logits.shape)"]
    assert subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout == "2 10\n"

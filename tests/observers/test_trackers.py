"""Trackers that a configuration names: what arrives in TensorBoard and Weights & Biases, and what own ones may do."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import sylva_ray
from sylva_ray import testing
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.tracking import TrackingSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Summary
from sylva_ray.federation.observer import Status
from sylva_ray.observers import registry
from sylva_ray.observers.registry import check_observers
from sylva_ray.observers.tracker import Tracker
from sylva_ray.observers.weights_and_biases import WeightsAndBiases

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


class Kept(Tracker):
    """Keeps what it gets."""

    logged: list[tuple[int, dict[str, float]]] = []  # noqa: RUF012
    calls: list[str] = []  # noqa: RUF012

    def start(self, step: int) -> None:
        self.calls.append(f"start {step}")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.logged.append((step, dict(values)))

    def finish(self, status: Status) -> None:
        self.calls.append(f"finish {status}")


class Failing(Tracker):
    """Cannot send anything."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        raise ConnectionError(f"no network for {len(values)} values of step {step}")


@pytest.fixture(autouse=True)
def fresh() -> None:
    Kept.logged, Kept.calls = [], []


class Finished(NamedTuple):
    """A run that has finished."""

    records: Sequence[StageRecord]
    summary: Summary


def run(folder: Path, *overrides: str, name: str = f"{__name__}:Kept") -> Finished:
    config: dict[str, Any] = testing.TINY | {"algorithm": {"name": "fedavg_at"}}
    config["tracking"] = {"enabled": False, "observers": [name]}
    summary = sylva_ray.run(config, overrides=list(overrides), out=folder, show="nothing")
    return Finished(sylva_ray.load_run(folder).records, summary)


def test_a_tracker_gets_the_metrics_of_every_stage_and_of_the_summary(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    steps = [record.step for record in result.records]
    assert [step for step, _ in Kept.logged] == [*steps, steps[-1]]
    assert Kept.calls == ["start 0", "finish FINISHED"]
    final = Kept.logged[-1][1]
    assert final["final/benign_accuracy/mean"] == pytest.approx(result.summary.final.benign_accuracy.mean)
    assert not any(name.startswith("client_") for _, values in Kept.logged for name in values)


def test_single_clients_are_sent_on_request(tmp_path: Path) -> None:
    run(tmp_path / "run", "tracking.detail=clients")
    assert any(name.startswith("client_002/") for name in Kept.logged[-2][1])


def test_a_finished_run_that_is_resumed_is_not_sent_again(tmp_path: Path) -> None:
    run(tmp_path / "run")
    num_logged = len(Kept.logged)
    sylva_ray.resume(tmp_path / "run", show="nothing")
    assert len(Kept.logged) == num_logged


def test_the_error_of_a_tracker_is_a_warning_of_the_run(tmp_path: Path) -> None:
    warnings = run(tmp_path / "run", name=f"{__name__}:Failing").summary.warnings
    assert [text for text in warnings if "Failing" in text and "no network" in text]
    with pytest.raises(AssertionError, match="no network"):
        testing.check_observer(f"{__name__}:Failing")


def test_an_own_tracker_keeps_its_contract() -> None:
    testing.check_observer(f"{__name__}:Kept")
    assert Kept.calls == ["start 0", "finish FINISHED"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        (f"{__name__}:ROOT", "is no tracker. Expected: .*inherits from"),
        (f"{__name__}:Missing", "cannot be imported"),
        ("no.such.module:Name", "no module"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_observers([name])


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'sylva_ray\[wandb\]'"):
        check_observers(["wandb"])


def test_tensorboard_reads_the_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = run(tmp_path / "run", name="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("final/benign_accuracy/mean")
    assert event.value == pytest.approx(result.summary.final.benign_accuracy.mean, abs=1e-6)
    assert [event.step for event in events.Scalars("upload_bytes")] == [record.step for record in result.records]
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_weights_and_biases_writes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run(tmp_path / "run", name="wandb")
    assert not any("WeightsAndBiases" in text for text in result.summary.warnings)
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"final/benign_accuracy/mean" in content
    assert repr(result.summary.final.benign_accuracy.mean).encode() in content


def test_trackers_of_this_package_are_what_the_settings_say() -> None:
    description = TrackingSection.model_fields["observers"].description or ""
    assert all(name in description for name in registry.TRACKERS)


def test_another_run_in_the_same_folder_is_another_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that is resumed is the same, wherever its folder is."""
    names: list[str] = []

    class Fake(ModuleType):
        Settings = staticmethod(lambda **_: None)

        @staticmethod
        def init(**given: Any) -> None:
            names.append(given["id"])

    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb"))
    folder = tmp_path / "run"

    def start(place: Path) -> None:
        place.mkdir(exist_ok=True)
        WeightsAndBiases(place, ExperimentConfig()).start(0)

    start(folder)
    start(folder)
    shutil.copytree(folder, tmp_path / "moved")
    start(tmp_path / "moved")
    shutil.rmtree(folder)
    start(folder)
    assert len(names) == 4
    assert len(set(names[:3])) == 1
    assert names[3] != names[0]

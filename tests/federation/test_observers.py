"""Observers that fail: a display never ends a run, and the end of the run reaches all observers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import sylva_ray
from sylva_ray.core.errors import RunError
from sylva_ray.core.records import StageRecord
from sylva_ray.federation.observer import Guarded, Notice, Observer, Observers, StageStarted, Status, TaskDone
from tests.conftest import TINY
from tests.federation.runs import bare_record

SHORT: Mapping[str, Any] = TINY | {
    "training": TINY["training"] | {"rounds": 1},
    "algorithm": {"name": "undefended"},
    "evaluation": {"attacks": [], "checks": False},
}


class Broken(Observer):
    """Fails at every task and at the end."""

    def on_task(self, done: TaskDone) -> None:
        """Fail."""
        raise ValueError(f"cannot draw {done.num_clients}\nclients")

    def on_end(self, status: Status) -> list[str]:
        """Fail."""
        raise OSError(f"no end: {status}")


class Heard(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def on_stage(self, started: StageStarted) -> None:
        """Keep it."""
        self.events.append(started.title)

    def on_task(self, done: TaskDone) -> None:
        """Keep it."""
        self.events.append(done)

    def on_record(self, record: StageRecord) -> None:
        """Keep it."""
        self.events.append(record.step)

    def on_notice(self, notice: Notice) -> None:
        """Keep it."""
        self.events.append(notice.text)

    def on_end(self, status: Status) -> list[str]:
        """Keep it and warn."""
        self.events.append(status)
        return ["heard"]


def test_a_display_that_fails_is_a_warning_and_gets_no_more_events(capsys: pytest.CaptureFixture[str]) -> None:
    heard = Heard()
    observers = Observers([Guarded(Broken()), heard])
    for _ in range(2):
        observers.on_task(TaskDone("training", 3, 3, 6))
    warning = "the observer Broken failed (ValueError: cannot draw 3 clients); the run went on without it"
    assert observers.on_end("FINISHED") == [warning, "heard"]
    assert heard.events == [TaskDone("training", 3, 3, 6)] * 2 + ["FINISHED"]
    assert capsys.readouterr().err == f"warning: {warning}\n"


def test_the_end_reaches_the_observers_after_one_that_fails() -> None:
    heard = Heard()
    assert Observers([Broken(), heard]).on_end("FAILED") == [
        "the observer Broken failed (OSError: no end: FAILED)",
        "heard",
    ]
    assert heard.events == ["FAILED"]


def test_an_observer_that_is_no_display_ends_the_run() -> None:
    observers = Observers([Broken()])
    observers.on_record(bare_record(0))
    with pytest.raises(ValueError, match="cannot draw"):
        observers.on_task(TaskDone("training", 3, 3, 6))


def test_only_a_full_disk_is_called_one(tmp_path: Path) -> None:
    class Closed(Observer):
        def on_record(self, record: StageRecord) -> None:
            del record
            raise PermissionError(13, "Permission denied", "/somewhere/else")

    with pytest.raises(RunError, match=r"Permission denied \(/somewhere/else\) while writing .*mended"):
        sylva_ray.run(SHORT, out=tmp_path / "run", show="nothing", observer=Closed())


def test_a_run_tells_the_observer_of_its_caller_and_a_resume_goes_on_behind_its_error(tmp_path: Path) -> None:
    class Full(Heard):
        def on_record(self, record: StageRecord) -> None:
            super().on_record(record)
            if record.step == 1:
                raise OSError(28, "No space left on device")

    full, heard = Full(), Heard()
    with pytest.raises(
        RunError, match=r"No space left on device while writing to .*: free some disk space, then resume"
    ):
        sylva_ray.run(SHORT, out=tmp_path / "run", show="nothing", observer=full)
    assert [event for event in full.events if isinstance(event, int)] == [0, 1]
    summary = sylva_ray.resume(tmp_path / "run", show="nothing", observer=heard)
    assert [event for event in heard.events if isinstance(event, int)] == [2]
    assert heard.events[0] == "phase 1: local epoch"
    assert heard.events[-1] == "FINISHED"
    assert "heard" in summary.warnings

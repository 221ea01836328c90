"""Checkpoints that are written in a thread: what a save waits for, whose arrays go on, and where errors arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.storage import arrays, checkpoint_writer, state_rows
from sylva_ray.storage.checkpoint_writer import CheckpointWriter, State
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.federation.runs import bare_record

CONFIG = build(ExperimentConfig, TINY)


class SlowFolder(RunFolder):
    """A run folder whose checkpoints are written only when they may be, and fail where they shall.

    Attributes:
        may_write: is set while writes go through.
        error: what the next write raises.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.may_write = threading.Event()
        self.error: OSError | None = None

    def save_checkpoint(self, *arguments: Any) -> Any:
        """Wait, then write or fail."""
        assert self.may_write.wait(20)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().save_checkpoint(*arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[SlowFolder]:
    slow = SlowFolder(tmp_path)
    yield slow
    slow.may_write.set()


def states_of(*values: float) -> list[State]:
    return [{"a": np.full(3, value, np.float32)} for value in values]


def save(writer: CheckpointWriter, states: Sequence[State], step: int) -> list[State]:
    return writer.save(CONFIG, states, [bare_record(k) for k in range(step + 1)], None, {})


def test_the_run_goes_on_while_a_checkpoint_is_written_and_the_next_save_waits_for_it(folder: SlowFolder) -> None:
    with CheckpointWriter(folder) as writer:
        states = save(writer, states_of(1, 2), 0)
        assert folder.checkpoints.latest() is None, "save has returned, nothing is written"
        states[1] = states_of(5)[0]
        threading.Timer(0.05, folder.may_write.set).start()
        save(writer, states, 1)
        assert folder.checkpoints.latest() is not None, "the one before is complete"
    newest = folder.checkpoints.latest()
    assert newest is not None
    assert newest.step == 1
    assert [state["a"][0] for state in newest.states] == [1, 5]
    assert newest.stored.num_rows == {0: 2, 1: 1}, "only what changed is written again"


def test_arrays_that_did_not_change_become_those_of_the_file(
    folder: SlowFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "MIN_MAPPED_BYTES", 1)
    monkeypatch.setattr(state_rows, "MIN_MAPPED_BYTES", 1)
    folder.may_write.set()
    given, changed = states_of(1, 2, 3), states_of(7)[0]
    with CheckpointWriter(folder) as writer:
        now = save(writer, given, 0)
        now[2] = changed
        settled = writer.settled(now)
    assert settled[2]["a"] is changed["a"]
    assert all(
        kept["a"] is not before["a"] and not kept["a"].flags.owndata
        for kept, before in zip(settled[:2], given, strict=False)
    )
    assert [state["a"][0] for state in settled] == [1, 2, 7]
    assert writer.settled(settled)[0]["a"] is settled[0]["a"], "settled once"


def test_the_caller_may_replace_what_it_has_given(folder: SlowFolder) -> None:
    with CheckpointWriter(folder) as writer:
        states, records, residuals = states_of(1, 2), [bare_record(0)], {0: {"a": np.ones(3, np.float32)}}
        states = writer.save(CONFIG, states, records, None, residuals)
        states[0] = states_of(9)[0]
        records.append(bare_record(1))
        residuals.clear()
        folder.may_write.set()
    newest = folder.checkpoints.latest()
    assert newest is not None
    assert (newest.states[0]["a"][0], len(newest.records), list(newest.residuals)) == (1, 1, [0])


@pytest.mark.parametrize("where", ["at the next save", "at the end"])
def test_an_error_arrives_where_the_run_waits_for_the_write(where: str, folder: SlowFolder) -> None:
    folder.error = OSError(28, "No space left on device")
    folder.may_write.set()
    writer = CheckpointWriter(folder)
    states = save(writer, states_of(1, 2), 0)
    waits: dict[str, Callable[[], object]] = {
        "at the next save": lambda: save(writer, states, 1),
        "at the end": lambda: writer.__exit__(None, None, None),
    }
    with pytest.raises(OSError, match="No space left"):
        waits[where]()
    assert folder.checkpoints.latest() is None


def interrupted(folder: SlowFolder) -> None:
    """A run that is interrupted while its checkpoint is written."""
    with CheckpointWriter(folder) as writer:
        save(writer, states_of(1, 2), 0)
        threading.Timer(0.05, folder.may_write.set).start()
        raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_its_checkpoint(folder: SlowFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(folder)
    assert folder.checkpoints.latest() is not None


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_write(folder: SlowFolder) -> None:
    folder.error = OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt):
        interrupted(folder)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_waits_where_a_copy_needs_it_and_where_too_much_would_stay_in_memory(
    in_background: bool, folder: SlowFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.may_write.set()
    with CheckpointWriter(folder, in_background) as writer:
        if in_background:
            monkeypatch.setattr(checkpoint_writer, "MAX_BYTES_BEHIND", 2 * 12 - 1)
        states = save(writer, states_of(1, 2), 0)
        assert (newest := folder.checkpoints.latest()) is not None
        assert newest.step == 0
        if in_background:
            states[0] = states_of(3)[0]
            folder.may_write.clear()
            save(writer, states, 1)  # of one client: does not wait
            folder.may_write.set()

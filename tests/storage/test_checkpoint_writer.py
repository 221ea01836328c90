"""States are written while a stage is evaluated; nobody hears of the stage before its checkpoint is complete."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.storage.checkpoint import CheckpointFolder, Draft
from sylva_ray.storage.checkpoint_writer import CheckpointWriter, State
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.federation.runs import bare_record

CONFIG = build(ExperimentConfig, TINY)


class SlowFolder(CheckpointFolder):
    """Checkpoints that are written only when they may be, and fail where they shall.

    Attributes:
        may_write: is set while writes go through.
        error: what the next write raises.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_write = threading.Event()
        self.error: OSError | None = None

    def begin(self, *arguments: Any) -> Draft | None:
        """Wait, then write or fail."""
        assert self.may_write.wait(20)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().begin(*arguments)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path)
    folder.checkpoints = SlowFolder(folder.checkpoints.root)
    yield folder
    slow(folder).may_write.set()


def slow(run: RunFolder) -> SlowFolder:
    assert isinstance(run.checkpoints, SlowFolder)
    return run.checkpoints


def states_of(*values: float) -> list[State]:
    return [{"a": np.full(3, value, np.float32)} for value in values]


def save(writer: CheckpointWriter, states: Sequence[State], step: int) -> list[State]:
    begun = writer.begin(step, states)
    return writer.complete(begun, CONFIG, states, [bare_record(k) for k in range(step + 1)], None, {})


def test_the_caller_goes_on_until_it_completes_the_checkpoint(run: RunFolder) -> None:
    states = states_of(1, 2)
    with CheckpointWriter(run) as writer:
        begun = writer.begin(0, states)
        assert not begun.done()
        assert run.checkpoints.latest() is None
        slow(run).may_write.set()
        begun.result()
        assert run.checkpoints.latest() is None, "all states are there, and it does not count"
        writer.complete(begun, CONFIG, states, [bare_record(0)], None, {})
        newest = run.checkpoints.latest()
    assert newest is not None
    assert (newest.step, [state["a"][0] for state in newest.states]) == (0, [1, 2])


def test_the_next_checkpoint_writes_what_has_changed(run: RunFolder) -> None:
    slow(run).may_write.set()
    with CheckpointWriter(run) as writer:
        states = save(writer, states_of(1, 2), 0)
        states[1] = states_of(5)[0]
        save(writer, states, 1)
    newest = run.checkpoints.latest()
    assert newest is not None
    assert [state["a"][0] for state in newest.states] == [1, 5]
    assert newest.stored.num_rows == {0: 2, 1: 1}


def test_a_complete_checkpoint_stays_and_so_do_the_states(run: RunFolder) -> None:
    slow(run).may_write.set()
    given = states_of(7, 8)
    with CheckpointWriter(run) as writer:
        save(writer, states_of(1, 2), 0)
        assert save(writer, given, 0) == given
    newest = run.checkpoints.latest()
    assert newest is not None
    assert [state["a"][0] for state in newest.states] == [1, 2]


def test_an_error_of_the_thread_arrives_with_the_record(run: RunFolder) -> None:
    slow(run).error = OSError(28, "No space left on device")
    slow(run).may_write.set()
    with CheckpointWriter(run) as writer, pytest.raises(OSError, match="No space left"):
        save(writer, states_of(1, 2), 0)
    assert run.checkpoints.latest() is None


def interrupted(run: RunFolder) -> None:
    """A run that is interrupted while it evaluates, and the states are written."""
    with CheckpointWriter(run) as writer:
        writer.begin(0, states_of(1, 2))
        threading.Timer(0.05, slow(run).may_write.set).start()
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")])
def test_an_interrupted_evaluation_leaves_no_thread_and_no_checkpoint(error: OSError | None, run: RunFolder) -> None:
    slow(run).error = error
    with pytest.raises(KeyboardInterrupt):
        interrupted(run)
    assert run.checkpoints.latest() is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_residuals_come_back_whatever_their_order_in_memory(tmp_path: Path) -> None:
    """A file holds rows: one of columns would come back permuted. A postprocessor of one's own may leave either."""
    transposed, scalar = np.arange(6, dtype=np.float32).reshape(2, 3).T, np.array(3.0, np.float32)
    folder = CheckpointFolder(tmp_path / "checkpoint")
    folder.save(0, [{"a": np.ones(2, np.float32)}], [bare_record(0)], None, {0: {"m": transposed, "s": scalar}})
    checkpoint = folder.latest()
    assert checkpoint is not None
    np.testing.assert_array_equal(checkpoint.residuals[0]["m"], transposed)
    np.testing.assert_array_equal(checkpoint.residuals[0]["s"], scalar)

"""Seconds belong to the innermost stage, whichever clock measures them."""

from __future__ import annotations

import pytest
import torch

from sylva_ray.core.timing import DeviceClock, Stopwatch, WallClock, stopwatch_of


class SteppedClock:
    """A clock like that of a GPU: its marks say nothing before the work is done. A mark is a second after the last."""

    def __init__(self) -> None:
        self.marks = 0
        self.is_done = False

    def now(self) -> int:
        self.marks += 1
        return self.marks

    def seconds(self, start: int, end: int) -> float:
        assert self.is_done, "the stopwatch waited for the device in the middle of the work"
        return float(end - start)


def test_nested_stages_share_the_time() -> None:
    clock = SteppedClock()
    stopwatch = Stopwatch(clock)
    with stopwatch("train"):  # marks 1 and 6
        for _ in range(2):  # marks 2 to 3, 4 to 5
            with stopwatch("attack"):
                pass
    with stopwatch("train"):  # marks 7 and 8, what is between 6 and 7 belongs to nobody
        pass
    clock.is_done = True
    assert stopwatch.seconds == {"train": 4.0, "attack": 2.0}
    assert stopwatch.seconds == {"train": 4.0, "attack": 2.0}, "reading changes nothing"


def test_a_stage_that_fails_is_measured_and_left() -> None:
    clock = SteppedClock()
    clock.is_done = True
    stopwatch = Stopwatch(clock)
    with pytest.raises(KeyError), stopwatch("train"), stopwatch("attack"):
        raise KeyError
    with stopwatch("game"):
        pass
    assert stopwatch.seconds == {"train": 2.0, "attack": 1.0, "game": 1.0}


def test_a_gpu_has_a_clock_of_its_own() -> None:
    assert isinstance(stopwatch_of(torch.device("cpu"))._clock, WallClock)
    assert isinstance(stopwatch_of(torch.device("cuda"))._clock, DeviceClock)

"""Measurement of the time that activities take, on the CPU and on a GPU."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from sylva_ray.core.lazy import torch


class Clock(Protocol):
    """Marks moments; the time between two may be read later."""

    def now(self) -> Any:
        """Return a mark of the present moment."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks."""
        ...


class WallClock:
    """The clock on the wall: its marks are seconds."""

    def now(self) -> float:
        """See `Clock`."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """See `Clock`."""
        return end - start


class DeviceClock:
    """The clock of a GPU, whose marks are events.

    The program runs ahead of the device. An event is passed when the device has done all that was asked of it before,
    so the time between two is that of the work between them; it is read when the work is done.
    """

    def now(self) -> torch.cuda.Event:
        """See `Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See `Clock`. It waits for the device."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


class Stopwatch:
    """Seconds by stage. Stages may be nested; the time of the inner stage is not counted in the outer one.

    >>> stopwatch = Stopwatch()
    >>> with stopwatch("train"):
    ...     with stopwatch("attack"):
    ...         pass
    >>> sorted(stopwatch.seconds)
    ['attack', 'train']

    Args:
        clock: that measures; None: the wall clock.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock: Clock = WallClock() if clock is None else clock
        self._intervals: list[tuple[str, Any, Any]] = []
        self._running: list[str] = []
        self._since: Any = None

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time of the ``with`` block for a stage."""
        self._mark()
        self._running.append(stage)
        try:
            yield
        finally:
            self._mark()
            self._running.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of every stage so far."""
        seconds: dict[str, float] = defaultdict(float)
        for stage, start, end in self._intervals:
            seconds[stage] += self._clock.seconds(start, end)
        return dict(seconds)

    def _mark(self) -> None:
        now = self._clock.now()
        if self._running:
            self._intervals.append((self._running[-1], self._since, now))
        self._since = now


def stopwatch_of(device: torch.device) -> Stopwatch:
    """Return a stopwatch for work on a device."""
    return Stopwatch(DeviceClock() if device.type == "cuda" else WallClock())

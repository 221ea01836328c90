"""Measurement of wall-clock time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall-clock seconds by stage. Stages may be nested; the time of the inner stage is not counted in the outer one.

    >>> stopwatch = Stopwatch()
    >>> with stopwatch("train"):
    ...     with stopwatch("attack"):
    ...         pass
    >>> sorted(stopwatch.seconds)
    ['attack', 'train']

    Attributes:
        seconds: so far, by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time of the ``with`` block for a stage."""
        self._add_elapsed()
        self._running.append(stage)
        try:
            yield
        finally:
            self._add_elapsed()
            self._running.pop()

    def _add_elapsed(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

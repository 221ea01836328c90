"""What every reader of this package promises for any input: a valid object, or one line that says what is wrong."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sylva_ray.core.errors import UserError

T = TypeVar("T")

MAX_SECONDS = 2.0
"""Of CPU time, for one input."""

MAX_GROWTH_MB = 200
"""By which an input may raise the peak of the process's memory."""

MAX_CHARACTERS = 2000
"""Of the line."""


def outcome(read: Callable[[], T], untouched: Path | None = None) -> T | UserError:
    """Call a reader with some input, and check that it keeps the promise.

    Args:
        read: the call; any exception but `UserError` fails the test.
        untouched: a folder in which nothing may be written.

    Returns:
        What ``read`` returned, or the error of one line that it raised.
    """
    before = _names(untouched)
    _reset_peak_memory()
    memory, started = _peak_megabytes(), time.process_time()
    result: T | UserError
    try:
        result = read()
    except UserError as error:
        result = error
    seconds, growth = time.process_time() - started, _peak_megabytes() - memory
    if isinstance(result, UserError):
        assert str(result).isprintable(), f"not one line: {result}"
        assert len(str(result)) < MAX_CHARACTERS, f"too long to read: {result}"
    costs = [f"{seconds:.1f} s of CPU"] * (seconds >= MAX_SECONDS) + [f"{growth:.0f} MB"] * (growth >= MAX_GROWTH_MB)
    assert not costs, " and ".join(costs)
    assert _names(untouched) == before, "something was written"
    return result


def _names(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(folder.rglob("*"))


def _reset_peak_memory() -> None:
    """Make the peak what is in use now, on Linux; elsewhere it stays that of all inputs so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_megabytes() -> float:
    """Return the peak; on Linux not that of `resource`, which counts the process that started this one, too."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

"""The checks of `outcome` themselves."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from sylva_ray.core.errors import UserError
from tests.fuzz.outcome import MAX_GROWTH_MB, MAX_SECONDS, outcome


def test_a_valid_object_and_an_error_of_one_line_pass() -> None:
    assert outcome(lambda: 3) == 3
    error = UserError("training.rounds", 0, "must be at least 1")

    def refuse() -> int:
        raise error

    assert outcome(refuse) is error


def _spend_time() -> None:
    end = time.process_time() + 1.05 * MAX_SECONDS
    while time.process_time() < end:
        pass


def test_too_much_time_fails() -> None:
    with pytest.raises(AssertionError, match="s of CPU"):
        outcome(_spend_time)


def _allocate(megabytes: int) -> str:
    """Return what `outcome` says of an allocation, in a process of its own.

    In that of the tests the peak is not the allocation alone: the kernel may take back other pages meanwhile.
    """
    program = f"from tests.fuzz.outcome import outcome; outcome(lambda: len(b'x' * ({megabytes} * 2**20)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    return done.stderr


def test_too_much_memory_fails() -> None:
    assert _allocate(MAX_GROWTH_MB // 4) == ""
    last = _allocate(2 * MAX_GROWTH_MB).splitlines()[-1]
    assert re.fullmatch(r"AssertionError: .*\d MB", last), last


def test_what_is_written_fails() -> None:
    with TemporaryDirectory() as folder, pytest.raises(AssertionError, match="written"):
        outcome(lambda: Path(folder, "x").touch(), untouched=Path(folder))

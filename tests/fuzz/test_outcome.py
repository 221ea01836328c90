"""The checks of `outcome` themselves."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from sylva_ray.core.errors import UserError
from tests.fuzz.outcome import outcome


def test_a_valid_object_and_an_error_of_one_line_pass() -> None:
    assert outcome(lambda: 3) == 3
    error = UserError("training.rounds", 0, "must be at least 1")

    def refuse() -> int:
        raise error

    assert outcome(refuse) is error


def _spend_time() -> None:
    end = time.process_time() + 2.1
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("read", "says"), [(_spend_time, "s of CPU"), (lambda: len(bytearray(b"x" * 400_000_000)), "MB")]
)
def test_too_much_time_and_memory_fail(read: object, says: str) -> None:
    gc.collect()  # what earlier tests have left must not be freed meanwhile, and so hide the growth
    with pytest.raises(AssertionError, match=says):
        outcome(read)  # type: ignore[arg-type]


def test_what_is_written_fails() -> None:
    with TemporaryDirectory() as folder, pytest.raises(AssertionError, match="written"):
        outcome(lambda: Path(folder, "x").touch(), untouched=Path(folder))

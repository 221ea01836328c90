"""A walk over coalitions that does not fit the memory is tried again with fewer images at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sylva_ray.core.windows import WindowLimits
from sylva_ray.federation.stages.layer_game.values import _in_memory


@pytest.fixture(autouse=True)
def nothing_to_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts that fail collect no garbage, which takes longer than these tests."""
    monkeypatch.setattr("sylva_ray.federation.stages.layer_game.values.release_memory", lambda: None)


class Walk:
    """A walk over 8 coalitions of 4 images on a machine with room for ``room`` images at once."""

    y, coalitions, max_stack = np.zeros(4), np.zeros((8, 3), dtype=bool), 2048

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []  # type: ignore[var-annotated]

    def run(self) -> np.ndarray:
        self.tried.append(min(self.max_stack, len(self.y) * len(self.coalitions)))
        if self.tried[-1] > self.room:
            raise MemoryError
        return np.zeros((8, 4))


def walk(room: int) -> Any:
    return Walk(room)


def test_every_attempt_has_a_smaller_stack_than_the_one_that_failed() -> None:
    limits, played = WindowLimits({"walk": 2048}), walk(room=10)
    _in_memory(played, limits)
    assert played.tried == [32, 16, 8]
    assert limits.reduced == {"walk": 8}


def test_a_walk_that_fits_keeps_its_stack() -> None:
    limits, played = WindowLimits({"walk": 512}), walk(room=10**9)
    _in_memory(played, limits)
    assert played.max_stack == 512
    assert not limits.reduced


def test_a_walk_of_single_images_that_does_not_fit_is_an_error() -> None:
    played = walk(room=0)
    with pytest.raises(MemoryError):
        _in_memory(played, WindowLimits({"walk": 2048}))
    assert played.tried == [32, 16, 8, 4, 2, 1]

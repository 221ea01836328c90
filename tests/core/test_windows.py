"""Windows cover every image once, stay within their limit, and are halved where the memory runs out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_ray.core.windows import (
    Window,
    WindowLimits,
    in_windows,
    limits_of,
    split_windows,
)


@pytest.fixture(autouse=True, scope="module")
def nothing_to_release() -> Iterator[None]:
    """Attempts that fail collect no garbage, which takes longer than these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sylva_ray.core.windows.release_memory", lambda: None)
        yield


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(COUNTS, st.integers(1, 60))
def test_windows_cover_every_image_once_and_are_small(counts: list[int], limit: int) -> None:
    windows = split_windows(counts, limit)
    assert [row for w in windows for row in range(w.rows.start, w.rows.stop)] == list(range(sum(counts)))
    for window in windows:
        own = [piece.stop - piece.start for piece in window.pieces(counts)]
        assert sum(own) == window.num_images
        assert len(own) * max(own) <= limit
    if len(counts) * max(counts) <= limit:
        assert windows == [Window(slice(0, sum(counts)), slice(0, len(counts)))]


@given(COUNTS, st.integers(1, 60))
def test_a_client_that_must_not_be_divided_is_in_one_window(counts: list[int], limit: int) -> None:
    for window in split_windows(counts, limit, divide_clients=False):
        assert all(
            piece == slice(0, count) for piece, count in zip(window.pieces(counts), counts[window.clients], strict=True)
        )


def test_pieces_are_places_within_each_client() -> None:
    first, second, third, _ = split_windows([2, 5, 1], 3)
    assert (first.pieces([2, 5, 1]), first.clients) == ([slice(0, 2)], slice(0, 1))
    assert second.pieces([2, 5, 1]) == [slice(0, 3)]
    assert (third.rows, third.pieces([2, 5, 1])) == (slice(5, 7), [slice(3, 5)])


class Machine:
    """A machine with room for ``room`` images, whose work is the list of images it was given."""

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []  # type: ignore[var-annotated]

    def run(self, window: Window) -> list[int]:
        self.tried.append(window.num_images)
        if window.num_images > self.room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return list(range(window.rows.start, window.rows.stop))


@settings(max_examples=25)
@given(COUNTS, st.integers(1, 60), st.integers(1, 20))
def test_a_window_that_runs_out_of_memory_is_halved_and_tried_again(counts: list[int], limit: int, room: int) -> None:
    limits, machine = WindowLimits({"forward": limit}), Machine(room)
    found = in_windows(counts, limits, "forward", machine.run)
    assert [row for part in found for row in part] == list(range(sum(counts)))
    assert bool(limits.reduced) == any(tried > room for tried in machine.tried)


def test_a_window_with_one_image_leaves_out_the_clients_without_any() -> None:
    """Their parameters may be what did not fit."""

    def run(window: Window) -> int:
        clients = window.clients.stop - window.clients.start
        if clients > 1:
            raise MemoryError
        return clients

    assert in_windows([1, 0, 0, 0], WindowLimits({"forward": 64}), "forward", run) == [1]


def test_a_single_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="can't allocate"):
        in_windows([3], WindowLimits({"attack": 8}), "attack", Machine(0).run)


def test_other_errors_are_not_repeated() -> None:
    calls = []

    def run(window: Window) -> None:
        calls.append(window)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_windows([4], WindowLimits(), "attack", run)
    assert len(calls) == 1


def test_attacks_have_the_window_of_training_or_of_evaluation() -> None:
    limits = WindowLimits({"attack": 10, "evaluate": 4})
    assert limits.of("attack") == 4
    limits.is_training = True
    assert limits.of("attack") == 10
    limits.halve("attack", 8)
    assert (limits.of("attack"), limits.reduced) == (4, {"attack": 4})
    assert limits_of(object()).of("train") > 10**9


def test_a_window_is_bounded_by_the_memory_and_by_what_passes_at_once() -> None:
    limits = WindowLimits({"train": 32, "forward": 4}, at_once=8)
    assert (limits.of("train"), limits.held("train"), limits.of("forward"), limits.of("walk")) == (8, 32, 4, 8)
    limits.keep_less("train", 20)
    assert (limits.of("train"), limits.held("train")) == (8, 10), "the windows stay as they were"
    limits.keep_less("train", 10)
    assert limits.held("train") == 8
    limits.halve("train", 8)
    assert (limits.of("train"), limits.reduced) == (4, {"train": 4})


def test_windows_are_reduced_to_those_of_before_and_never_made_larger() -> None:
    limits = WindowLimits({"train": 32, "forward": 4})
    limits.reduce({"train": 8, "forward": 16, "walk": 2})
    assert limits.fitting == {"train": 8, "forward": 4}
    assert limits.reduced == {"train": 8}


def test_another_attempt_has_half_of_what_passed_at_once_and_not_of_what_was_planned() -> None:
    limits = WindowLimits({"train": 2048, "attack": 2048, "evaluate": 2048, "walk": 1})
    assert limits.smaller() == {"train": 1024, "attack": 1024, "evaluate": 1024}, "a task that failed before any pass"
    limits.is_training = True
    limits.begin("train", 64)
    in_windows([64, 3], limits, "attack", lambda window: window)
    limits.begin("train", 16)
    assert limits.smaller() == {"train": 32, "attack": 33}
    limits.reduce(limits.smaller())
    assert limits.fitting == {"train": 32, "attack": 33, "evaluate": 2048, "walk": 1}
    limits.halve("train", 2)
    assert limits.smaller() == {"attack": 16}, "a single image cannot be halved"
    limits.begin_task()
    limits.begin("walk", 1)
    assert limits.smaller() == {}
    assert limits.num_passes == 4


@settings(max_examples=25)
@given(COUNTS, st.integers(0, 20))
def test_every_further_attempt_passes_fewer_images_at_once(counts: list[int], room: int) -> None:
    """The memory that a task needs besides its windows may be what is missing."""
    limits, largest = WindowLimits({"forward": 2048}), []
    while True:
        limits.begin_task()
        machine = Machine(10**6)
        in_windows(counts, limits, "forward", machine.run)
        largest.append(max(machine.tried, default=0))
        if largest[-1] <= room or not limits.smaller():
            break
        limits.reduce(limits.smaller())
    assert largest == sorted(set(largest), reverse=True)
    assert largest[-1] <= max(1, room)


def test_images_that_must_not_be_divided_are_not_tried_again_in_the_same_number() -> None:
    limits = WindowLimits({"train": 2048})
    in_windows([5, 8], limits, "train", lambda window: window, divide_clients=False)
    assert limits.smaller() == {"train": 6}, "one client after the other"
    limits.reduce({"train": 6})
    limits.begin_task()
    in_windows([5, 8], limits, "train", lambda window: window, divide_clients=False)
    assert limits.smaller() == {}

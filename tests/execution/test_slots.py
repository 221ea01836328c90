"""When an actor counts as hung, and what the pool gives the next one, with a clock and actors that are made up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.config.training import Windows
from sylva_ray.core.errors import DeviceError, OutOfMemoryError, RunError
from sylva_ray.federation.client.training import TrainSettings, TrainTask
from sylva_ray.preparation.resolve import resolve_config
from tests.conftest import TINY
from tests.execution.conftest import Notices

ray = pytest.importorskip("ray")

from sylva_ray.execution.ray import pool as pool_module  # noqa: E402
from sylva_ray.execution.ray import slots  # noqa: E402
from sylva_ray.execution.ray.client_actor import Progress  # noqa: E402
from sylva_ray.execution.ray.pool import RayPool  # noqa: E402
from sylva_ray.execution.ray.slots import Loss, Slot  # noqa: E402

TASK = TrainTask(1, (0,), {}, TrainSettings(0.0, 0.1, epochs=1))
HOUR = 3600.0


class Actor:
    """An actor that has begun ``passes``, or does not answer."""

    def __init__(self) -> None:
        self.passes, self.answers = 0, True
        self.progress = SimpleNamespace(remote=lambda: self)


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Actor:
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs if refs[0].answers else [], []))
    monkeypatch.setattr(ray, "get", lambda ref: Progress(ref.passes, {"train": 32}))
    return Actor()


@pytest.fixture
def hang_of(actor: Actor) -> Callable[..., str | None]:
    """Whether the actor hangs, as a pool sees it that looks at a time."""

    def make(**section: Any) -> Callable[[float], str | None]:
        pool = object.__new__(RayPool)
        pool._section = build(ExperimentConfig, TINY | {"cluster": section}).cluster
        pool._slowest = {}
        slot = Slot(actor, None, Windows())  # type: ignore[arg-type]
        slot.give(0, None, 0.0)  # type: ignore[arg-type]

        def look(now: float) -> str | None:
            slot.listen(now)
            return pool._hang_of(slot, TASK, now)

        return look

    return make  # type: ignore[return-value]


def test_a_first_task_that_computes_nothing_for_an_hour_hangs(hang_of: Any, actor: Actor) -> None:
    look = hang_of()
    for now in range(0, 3600, 60):
        assert look(now) is None
    actor.passes = 1  # CUDA has started, the kernels are compiled
    for now in range(3600, 7200, 60):
        assert look(now) is None
    found = next(text for now in range(7200, 9000, 60) if (text := look(now)))
    assert found == "its task computed nothing for 3660 s; cluster.task_deadline_s would give it longer"


def test_a_first_task_may_take_as_long_as_it_computes(hang_of: Any, actor: Actor) -> None:
    look = hang_of()
    for now in range(0, 500_000, 1800):
        actor.passes += 1
        assert look(now) is None


def test_a_deadline_of_the_user_alone_decides(hang_of: Any) -> None:
    look = hang_of(task_deadline_s=3 * HOUR)
    assert not any(look(now) for now in range(0, 10_800, 600))
    assert look(3 * HOUR + 1) == "its task took longer than 10800 s (cluster.task_deadline_s)"


def test_an_actor_is_silent_since_it_was_asked_and_not_since_it_got_its_task(hang_of: Any, actor: Actor) -> None:
    """Where other actors answer all the time, nobody asks."""
    look = hang_of()
    assert look(5 * HOUR) is None
    assert look(10 * HOUR) is None
    actor.answers = False
    assert look(10 * HOUR + 100) is None
    assert look(10 * HOUR + 121) == "its process gave no sign of life for 121 s"


def test_an_answer_to_a_question_of_long_ago_says_nothing_of_now(hang_of: Any, actor: Actor) -> None:
    look = hang_of()
    look(0.0)
    look(1.0)
    assert look(10 * HOUR) is None, "the answer is of the first second"
    actor.passes = 1
    assert look(10 * HOUR + 5) is None
    assert look(10 * HOUR + 10) is None


@pytest.fixture
def pool() -> RayPool:
    """A pool with the planned windows, without actors."""
    made = object.__new__(RayPool)
    config = resolve_config(build(ExperimentConfig, TINY))
    made._arguments, made._observer = (config, None, None, ()), Notices()  # type: ignore[assignment]
    return made


def windows_of(pool: RayPool) -> Windows:
    return pool._arguments[0].training.windows


def slot_with(windows: Windows, progress: Progress | None = None) -> Slot:
    return Slot(None, None, windows, node=None, job=0, progress=progress)  # type: ignore[arg-type]


def test_a_new_actor_has_windows_of_half_the_images_that_did_not_fit(pool: RayPool) -> None:
    old = slot_with(windows_of(pool))
    pool._shrink_windows(old, "train", Loss.from_cause(OutOfMemoryError("full", {"train": 32})))
    assert windows_of(pool) == Windows(train=32)
    assert pool._observer.texts == ["train did not fit the memory; a new worker has smaller windows"]  # type: ignore[attr-defined]
    # of another actor, that was started with the windows before
    pool._shrink_windows(old, "train", Loss.from_cause(OutOfMemoryError("full", {"train": 32, "attack": 48})))
    assert windows_of(pool) == Windows(train=32, attack=48)
    pool._shrink_windows(old, "train", Loss.from_cause(OutOfMemoryError("full")))  # its single images were too many
    with pytest.raises(RunError, match="full; one image at a time does not fit"):
        pool._shrink_windows(slot_with(windows_of(pool)), "train", Loss.from_cause(OutOfMemoryError("full")))


def test_windows_of_a_process_that_was_killed_are_those_it_told_of(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "live_nodes", list)
    killed = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.")
    old = slot_with(windows_of(pool), Progress(7, {"train": 24}))
    pool._shrink_windows(old, "train", Loss.from_error(old, killed))
    assert windows_of(pool) == Windows(train=24)
    silent = slot_with(windows_of(pool))
    pool._shrink_windows(silent, "train", Loss.from_error(silent, killed))
    assert windows_of(pool) == Windows(train=12, attack=1024, evaluate=1024, forward=1024, walk=1024)
    pool._shrink_windows(silent, "train", Loss.from_error(silent, killed))
    assert windows_of(pool).train == 12, "it is tried with the windows that have become smaller since"


@pytest.mark.parametrize(
    ("loss", "train"),
    [
        (Loss("the worker died", is_unexplained=True), [2048, 2048, 1024]),
        (Loss("its process gave no sign of life for 121 s"), [2048] * 3),
        (Loss("its node was lost", with_node=True), [2048] * 3),
    ],
)
def test_the_last_try_of_a_task_has_smaller_windows_if_nobody_knows_why_its_processes_ended(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch, loss: Loss, train: list[int]
) -> None:
    """A container's memory limit kills a process without a word."""
    pool._section = build(ExperimentConfig, TINY | {"cluster": {"max_task_retries": 3}}).cluster
    monkeypatch.setattr(pool, "_stop_actor", lambda _: None)
    monkeypatch.setattr(pool, "_start", lambda _: slot_with(windows_of(pool)))
    batch = pool_module._Batch([TASK], None, None)
    pool._slots = [slot_with(windows_of(pool))]
    seen = []
    for _ in range(3):
        pool._replace(0, "train", batch, loss)
        seen.append(windows_of(pool).train)
    assert seen == train
    if not loss.with_node:
        with pytest.raises(RunError, match=f"train: the client actor was lost 4 time.*{loss.reason}"):
            pool._replace(0, "train", batch, loss)


@pytest.mark.parametrize(
    ("told", "retries", "train"), [({"train": 24}, 2, 24), ({}, 2, 1024), ({"train": 24}, 1, 2048)]
)
def test_the_last_try_has_half_of_what_a_process_last_had_at_once(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch, told: dict[str, int], retries: int, train: int
) -> None:
    """One loss may be chance, and changes no windows."""
    pool._section = build(ExperimentConfig, TINY | {"cluster": {"max_task_retries": retries}}).cluster
    monkeypatch.setattr(slots, "live_nodes", list)
    monkeypatch.setattr(pool, "_stop_actor", lambda _: None)
    monkeypatch.setattr(pool, "_start", lambda _: slot_with(windows_of(pool)))
    batch = pool_module._Batch([TASK], None, None)
    for _ in range(retries):
        pool._slots = [slot_with(windows_of(pool), Progress(7, told))]
        pool._replace(0, "train", batch, Loss.from_error(pool._slots[0], ray.exceptions.ActorDiedError()))  # type: ignore[arg-type]
    assert windows_of(pool).train == train


def test_a_process_that_ended_without_a_word_is_unexplained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "live_nodes", list)
    slot = slot_with(Windows())
    died, full = ray.exceptions.ActorDiedError(), ray.exceptions.OutOfMemoryError("low on memory")
    lost = ray.exceptions.ObjectLostError("0" * 56, None, "")
    assert Loss.from_error(slot, died).is_unexplained
    assert not Loss.from_error(slot, full).is_unexplained
    assert not Loss.from_error(slot, lost).is_unexplained
    assert not Loss.from_cause(DeviceError("CUDA error")).is_unexplained


def test_a_gpu_that_failed_says_nothing_of_windows() -> None:
    loss = Loss.from_cause(DeviceError("CUDA error: an illegal memory access was encountered"))
    assert (loss.by_memory, loss.windows) == (False, None)


def test_the_limits_are_those_that_the_documentation_names() -> None:
    assert (pool_module.MIN_TASK_SECONDS, pool_module.TASK_PATIENCE, pool_module.MAX_IDLE_S) == (600, 30, HOUR)


class Loop:
    """A pool of one actor that answers one task a second, with a clock that is made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.looks = 0.0, list[float]()
        self.pool = object.__new__(RayPool)
        slot = Slot(Actor(), None, Windows())  # type: ignore[arg-type]
        slot.pending, slot.node = None, "node"
        self.pool._slots = [slot]
        monkeypatch.setattr(type(slot), "has_started", True)
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("sylva_ray.execution.ray.pool.time", clock)
        monkeypatch.setattr(self.pool, "_dispatch", self._dispatch)
        monkeypatch.setattr(self.pool, "_wait", self._wait)
        monkeypatch.setattr(self.pool, "_collect", lambda _, batch: batch.finish(self.given.pop(), "done"))
        monkeypatch.setattr(self.pool, "_replace_hung", lambda _: self.looks.append(self.now))
        monkeypatch.setattr(self.pool, "_abandon_running", lambda **_: None)
        self.given: list[int] = []

    def _dispatch(self, batch: Any) -> None:
        if not self.given:
            self.given.append(batch.queue.popleft())

    def _wait(self, timeout_s: float) -> int | None:
        if not self.given:
            self.now += max(0.0, timeout_s)
            return None
        self.now += 1
        return 0


def test_hung_actors_are_looked_for_while_others_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch)
    assert loop.pool.run([TASK] * 18) == ["done"] * 18
    assert loop.looks == [5, 10, 15]


def test_no_task_begins_after_the_deadline_however_fast_the_others_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch)
    results = loop.pool.run([TASK] * 18, deadline_s=7)
    assert results == ["done"] * 7 + [None] * 11
    assert loop.now == 7

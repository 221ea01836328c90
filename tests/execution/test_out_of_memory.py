"""What does not fit the memory is computed in smaller windows, here or by a new actor, and the results say so."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sylva_ray.core.errors import OutOfMemoryError, RunError
from sylva_ray.core.types import ParameterStack
from sylva_ray.core.windows import in_windows
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.server import Server
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.preparation.experiment import Prepared, create_worker
from sylva_ray.storage.run_folder import RunFolder
from tests.execution.conftest import Notices
from tests.federation.runs import bare_record

ray = pytest.importorskip("ray")

from sylva_ray.execution.ray.pool import RayPool  # noqa: E402

MakeTask = Callable[..., CohortTask]
FULL = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@dataclass(frozen=True)
class HungryTask(CohortTask):
    """Fits in windows of at most ``most`` training images."""

    most: int = 0

    stage: ClassVar[str] = "hungry"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> Sequence[Any]:
        del params
        if worker.model.windows.of("train") > self.most:
            raise RuntimeError(FULL)
        return [0] * len(self.clients)


@dataclass(frozen=True)
class LargeTask(CohortTask):
    """Passes a batch of 64 images, and fits if at most ``most`` pass at once."""

    most: int = 0

    stage: ClassVar[str] = "large"
    tried: ClassVar[list[int]] = []

    def execute(self, worker: CohortWorker, params: ParameterStack) -> Sequence[Any]:
        del params
        largest = max(in_windows([64], worker.model.windows, "train", lambda window: window.num_images))
        self.tried.append(largest)
        if largest > self.most:
            raise RuntimeError(FULL)
        return [0] * len(self.clients)


@dataclass(frozen=True)
class FailingCardTask(CohortTask):
    """Finds a GPU that has failed, until ``marker`` exists."""

    marker: str = ""

    stage: ClassVar[str] = "unlucky"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> Sequence[Any]:
        del worker, params
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return [0] * len(self.clients)


@pytest.fixture
def pool(local_ray: None, on_ray: Prepared) -> Any:  # noqa: ARG001
    notices = Notices()
    made = RayPool(on_ray.config, ray.put(on_ray.fleet), ray.put(on_ray.backbone), 1, notices)
    yield made, notices
    made.close()


def test_a_window_that_does_not_fit_is_halved_within_its_task(
    tiny: Prepared, train_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = train_task((0, 1))
    expected = InProcessPool(create_worker(tiny.config, tiny.fleet, tiny.backbone)).run([task])[0]
    worker = create_worker(tiny.config, tiny.fleet, tiny.backbone)
    forward = worker.model._forward

    def with_room_for_eight(params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        if len(x) > 8:
            raise RuntimeError(FULL)
        return forward(params, x, owner)

    monkeypatch.setattr(worker.model, "_forward", with_room_for_eight)
    found = InProcessPool(worker).run([task])[0]
    assert expected is not None
    assert found is not None
    assert found.windows["train"] <= 8
    assert found.windows["attack"] <= 8
    assert found.windows["evaluate"] == expected.windows["evaluate"]
    for own, other in zip(found.outcomes, expected.outcomes, strict=True):
        assert own.metrics["loss"] == pytest.approx(other.metrics["loss"], abs=1e-3)
        for name, value in other.state.items():
            difference = np.linalg.norm(own.state[name] - value)
            assert difference <= 0.02 * np.linalg.norm(value) + 1e-4, name  # a sign of PGD may differ


@pytest.mark.long
def test_a_task_that_does_not_fit_runs_again_in_smaller_windows(tiny: Prepared, train_task: MakeTask) -> None:
    start = train_task((0,))
    pool = InProcessPool(create_worker(tiny.config, tiny.fleet, tiny.backbone))
    (result,) = pool.run([HungryTask(1, start.clients, start.states, most=300)])
    assert result is not None
    assert result.windows["train"] == 256
    with pytest.raises(RunError, match=r"hungry, step 1, client 0: RuntimeError: .*one image at a time does not fit"):
        pool.run([HungryTask(1, start.clients, start.states, most=0)])


def test_every_further_attempt_has_fewer_images_than_the_one_that_failed(
    tiny: Prepared, train_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan allows 2,048 images, the batch has 64."""
    monkeypatch.setattr(LargeTask, "tried", [])
    start = train_task((0,))
    pool = InProcessPool(create_worker(tiny.config, tiny.fleet, tiny.backbone))
    (result,) = pool.run([LargeTask(1, start.clients, start.states, most=20)])
    assert result is not None
    assert LargeTask.tried == [64, 32, 16]
    assert result.windows == {"train": 16, "attack": 2048, "evaluate": 2048, "forward": 2048, "walk": 2048}
    with pytest.raises(RunError, match="one image at a time does not fit"):
        pool.run([LargeTask(1, start.clients, start.states, most=0)])
    assert LargeTask.tried == [64, 32, 16, 16, 8, 4, 2, 1]


def test_an_error_brings_the_windows_of_the_next_attempt_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(OutOfMemoryError("full", {"train": 32})))
    assert (str(error), error.windows) == ("full", {"train": 32})


def test_the_record_of_a_stage_names_the_windows_that_were_smaller(
    tiny: Prepared, train_task: MakeTask, tmp_path: Path
) -> None:
    start = train_task((0,))
    pool = InProcessPool(create_worker(tiny.config, tiny.fleet, tiny.backbone))
    server = Server(
        tiny.config,
        pool.worker.algorithm,  # type: ignore[arg-type]
        tiny.fleet,
        [dict(start.states)] * 3,
        {},
        pool,
        RunFolder(tmp_path),
        Observer(),
    )
    server.run([HungryTask(1, start.clients, start.states, most=2048)])
    assert server.costs.reduced_windows == {}
    server.run([HungryTask(1, start.clients, start.states, most=600)])
    reduced = dict.fromkeys(("train", "attack", "evaluate", "forward", "walk"), 512)
    assert server.costs.reduced_windows == reduced
    resumed = InProcessPool(create_worker(tiny.config, tiny.fleet, tiny.backbone))
    server.pool = resumed
    server.records = [
        bare_record(0),
        bare_record(1).model_copy(update={"reduced_windows": {**reduced, "walk": 64}}),
        bare_record(2).model_copy(update={"reduced_windows": {"walk": 256}}),
    ]
    server.keep_windows()
    assert resumed.worker.model.windows.fitting == {**reduced, "walk": 64}, "the smallest of all stages"


@pytest.mark.slow
def test_an_actor_that_does_not_fit_is_replaced_by_one_with_half_the_windows(
    pool: tuple[RayPool, Notices], train_task: MakeTask
) -> None:
    ray_pool, notices = pool
    start = train_task((0,))
    (result,) = ray_pool.run([HungryTask(1, start.clients, start.states, most=1100)])
    assert result is not None
    assert result.windows["train"] == 1024
    assert "hungry, step 1, client 0 did not fit the memory; a new worker has smaller windows" in notices.texts
    told = len(notices.texts)
    ray_pool.reduce_windows({"train": 512})
    (result,) = ray_pool.run([HungryTask(2, start.clients, start.states, most=600)])
    assert result is not None
    assert (result.windows["train"], result.windows["attack"]) == (512, 1024)
    assert len(notices.texts) == told, "the same worker"


@pytest.mark.long
def test_a_gpu_that_fails_is_the_end_of_its_actor_alone(
    pool: tuple[RayPool, Notices], train_task: MakeTask, tmp_path: Path
) -> None:
    ray_pool, notices = pool
    start = train_task((0,))
    task = FailingCardTask(1, start.clients, start.states, marker=str(tmp_path / "failed"))
    (result,) = ray_pool.run([task])
    assert result is not None
    assert "a worker was lost during unlucky, step 1, client 0; its clients run again elsewhere" in notices.texts


def test_the_error_of_a_task_without_room_is_one_line(tiny: Prepared, train_task: MakeTask) -> None:
    start = train_task((0,))
    worker = create_worker(tiny.config, tiny.fleet, tiny.backbone)
    with pytest.raises(OutOfMemoryError, match=r"^RuntimeError: \[enforce fail .* can't allocate memory: .*$"):
        worker.run(HungryTask(1, start.clients, start.states, most=0))

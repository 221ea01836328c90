"""The Ray pool gives what the in-process pool gives, bit for bit, and says the same when a task fails."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import RunError
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.client.measuring import EvaluateTask
from sylva_ray.federation.client.training import TrainOutcome, TrainSettings, TrainTask
from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.context import Merge, RoundUploads
from sylva_ray.federation.merging import MergeTask, merge_on_pool
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.preparation.experiment import Prepared, create_worker
from tests.algorithms.toys import arrive, fleet
from tests.conftest import TINY

ray = pytest.importorskip("ray")

from sylva_ray.execution.ray.pool import RayPool  # noqa: E402

MakeTask = Callable[..., CohortTask]


@pytest.fixture(scope="module")
def two(local_ray: None, on_ray: Prepared) -> Iterator[RayPool]:  # noqa: ARG001
    """Two actors that the tests of this file share."""
    pool = RayPool(on_ray.config, ray.put(on_ray.fleet), ray.put(on_ray.backbone), num_actors=2, observer=Observer())
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def in_process(tiny: Prepared) -> InProcessPool:
    return InProcessPool(create_worker(tiny.config, tiny.fleet, tiny.backbone))


def states(results: list[CohortResult[Any] | None]) -> list[dict[str, np.ndarray]]:
    """All clients' trained states, in the order of the results."""
    found: list[TrainOutcome] = [outcome for result in results if result is not None for outcome in result.outcomes]
    return [dict(outcome.state) for outcome in found]


def assert_same_bits(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_training_in_other_processes_gives_the_same_bits(
    two: RayPool, in_process: InProcessPool, train_task: MakeTask
) -> None:
    tasks = [train_task((0, 1)), train_task((2,)), train_task((1,))]
    finished: list[CohortTask] = []
    results = two.run(tasks, on_done=lambda task, _: finished.append(task))
    assert [result.clients for result in results if result] == [(0, 1), (2,), (1,)], "results in the order of the tasks"
    assert sorted(task.clients for task in finished) == [(0, 1), (1,), (2,)]
    assert_same_bits(states(results), states(in_process.run(tasks)))


def test_merges_on_actors_give_the_same_bits(two: RayPool, in_process: InProcessPool) -> None:
    """The uploads that all tasks share are sent beside them."""
    method = in_process.worker.algorithm
    uploads = arrive(method, fleet(40))
    members = [[client, (client + 1) % 40, (client + 7) % 40] for client in range(40)]
    merges = [Merge(group, np.array([0.5, 0.25, 0.25]), group[0]) for group in members]

    def spread(tasks: Sequence[MergeTask], shared: RoundUploads) -> dict[int, dict[str, np.ndarray]]:
        done = [result for result in two.run(tasks, shared=shared) if result is not None]
        return {client: merged for r in done for client, merged in zip(r.clients, r.outcomes, strict=True)}

    names = list(uploads.by_client[0])
    apart = merge_on_pool(1, uploads, names, merges, two.num_actors, spread)
    assert_same_bits(apart, method.merge_each(uploads, names, merges))


def test_evaluation_in_other_processes_gives_the_same_predictions(
    two: RayPool, in_process: InProcessPool, train_task: MakeTask, on_ray: Prepared
) -> None:
    start = train_task((0, 2))
    task = EvaluateTask(1, start.clients, start.states, on_ray.config.evaluation.specs)
    (here,), (there,) = in_process.run([task]), two.run([task])
    assert here is not None
    assert there is not None
    for a, b in zip(here.outcomes, there.outcomes, strict=True):
        assert a.predictions.keys() == b.predictions.keys()
        assert all(np.array_equal(a.predictions[name], b.predictions[name]) for name in a.predictions)


def test_results_are_our_own_memory(two: RayPool, train_task: MakeTask) -> None:
    """Ray hands out read-only views that pin its object store; a coordinator keeps states for the whole run."""
    (state,) = states(two.run([train_task((0,))]))
    assert all(value.flags.writeable for value in state.values())


def test_a_client_process_imports_neither_peft_nor_a_tracker(two: RayPool) -> None:
    slot = two._slots[0]
    assert slot is not None
    # a lambda travels by value; a named function would make the actor import this file, and all that it imports
    loaded = ray.get(slot.actor.__ray_call__.remote(lambda _: set(sys.modules)))
    assert "torch" in loaded
    assert not {"peft", "transformers", "mlflow", "matplotlib"} & loaded


def test_a_failing_task_is_reported_like_in_process_and_the_pool_lives_on(
    two: RayPool, in_process: InProcessPool, train_task: MakeTask
) -> None:
    bad = train_task((99,))
    messages = []
    for pool in (in_process, two):
        with pytest.raises(RunError) as caught:
            pool.run([bad])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[1].startswith("train, step 1, client 99: IndexError: ")
    good = [train_task((2,))]
    assert_same_bits(states(two.run(good)), states(in_process.run(good)))


@pytest.mark.long
def test_who_misses_the_deadline_is_none_and_the_pool_lives_on(
    two: RayPool, in_process: InProcessPool, train_task: MakeTask
) -> None:
    quick, endless = train_task((2,)), train_task((0, 1), epochs=1_000_000)
    late, on_time = two.run([endless, quick], deadline_s=15)
    assert late is None
    expected = states(in_process.run([quick]))
    assert_same_bits(states([on_time]), expected)
    assert_same_bits(states(two.run([quick, quick])), expected * 2)


def test_a_task_may_take_as_much_longer_as_it_has_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sylva_ray.execution.ray.pool.MIN_TASK_SECONDS", 0.0)
    pool = object.__new__(RayPool)
    pool._section, pool._slowest = build(ExperimentConfig, TINY).cluster, {}
    short, long = (TrainTask(1, (0,), {}, TrainSettings(0.0, 0.1, epochs=epochs)) for epochs in (1, 40))
    assert pool._task_deadline_s(short) == math.inf
    pool._slowest[TrainTask] = 2.0
    assert pool._task_deadline_s(long) == 40 * pool._task_deadline_s(short) > 0

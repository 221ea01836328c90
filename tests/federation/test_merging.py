"""Merges as tasks: wherever they run, results have the same bits."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sylva_ray.federation.context import Merge, RoundUploads
from sylva_ray.federation.merging import MergeTask, merge_on_pool
from tests.algorithms.toys import arrive, equal, fleet, method


@pytest.mark.parametrize("rule", ["mean", "self_centred_clipping", "geometric_median"])
def test_tasks_merge_as_one_process_does(rule: str) -> None:
    """Each with a copy of the uploads, as on another machine."""
    made = method("sylva", adapters="neighbours", heads="local", robust={"rule": rule})
    uploads = arrive(made, fleet(12))
    tasks: list[MergeTask] = []

    def run(given: Sequence[MergeTask], shared: RoundUploads) -> Mapping[int, dict[str, np.ndarray]]:
        tasks.extend(given)
        merged: dict[int, dict[str, np.ndarray]] = {}
        for task in given:
            worker: Any = SimpleNamespace(algorithm=made, shared=pickle.loads(pickle.dumps(shared)))
            merged |= zip(task.clients, task.execute(worker, {}), strict=True)
        return merged

    def spread(given: RoundUploads, names: Sequence[str], merges: Any) -> list[dict[str, np.ndarray]]:
        return merge_on_pool(3, given, names, merges, 2, run)

    together = made.aggregate(uploads)
    apart = made.aggregate(RoundUploads(**{**vars(uploads), "run_merges": spread}))
    assert all(equal(one, other) for one, other in zip(together, apart, strict=True))
    assert len(tasks) > 2
    assert sorted(client for task in tasks for client in task.clients) == list(range(12))


@pytest.mark.parametrize("size", [2, 5])
def test_large_neighbourhoods_have_the_same_bits_in_tasks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are merged together (`sylva_ray.aggregation.receivers`), whatever part of them a task gets."""
    monkeypatch.setattr("sylva_ray.aggregation.receivers.MIN_COLUMNS", 32)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 50)), rng.normal(size=(60, 4))
    states = [
        {
            "m.lora_A": (a + 0.02 * rng.normal(size=a.shape)).astype(np.float32),
            "m.lora_B": (b + 0.02 * rng.normal(size=b.shape)).astype(np.float32),
        }
        for _ in range(24)
    ]
    made = method("sylva", adapters="neighbours", heads="local", num_neighbours=10)
    uploads = RoundUploads(2, states, states, dict(enumerate(states)), [10] * len(states))
    names = list(states[0])
    members = [sorted(rng.choice(24, 10, replace=False).tolist()) for _ in states]
    merges = [Merge(group, np.full(10, 0.1), group[0]) for group in members]
    together = made.merge_each(uploads, names, merges)
    alone = [made.merge(uploads, names, m.members, m.weights, m.receiver) for m in merges]
    assert not all(map(equal, together, alone)), "these were merged one by one"
    for first in range(0, len(merges), size):
        part = merges[first : first + size]
        task = MergeTask(3, tuple(m.receiver for m in part), {}, tuple(names), tuple(part))
        worker: Any = SimpleNamespace(algorithm=made, shared=pickle.loads(pickle.dumps(uploads)))
        for one, other in zip(task.execute(worker, {}), together[first : first + size], strict=True):
            assert equal(one, other)

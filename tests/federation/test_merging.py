"""Merges as tasks: wherever they run, results have the same bits."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sylva_ray.federation.context import RoundUploads
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

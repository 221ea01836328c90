"""The merges of a round as tasks of the pool: receivers do not depend on each other.

A task is `sylva_ray.federation.method.Method.merge_here` for some of the receivers, on one thread. Where it runs
plays no part in its bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from sylva_ray.aggregation.threads import in_turn
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.context import Merge, RoundUploads
from sylva_ray.federation.tasks import CohortTask

MIN_MEMBERS = 256
"""Fewer uploads in all merges of a round are merged by the coordinator: sending them would take longer."""

TASKS_PER_ACTOR = 4
"""So that actors which are slower, or lost, delay the round little."""


@dataclass(frozen=True)
class MergeTask(CohortTask):
    """Merges for some receivers, from uploads that all tasks of a round share.

    Attributes:
        names: the parameters to merge.
        merges: one for each of ``clients``.
    """

    names: tuple[str, ...] = ()
    merges: tuple[Merge, ...] = ()

    stage: ClassVar[str] = "aggregation"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> Sequence[Any]:
        """Return the merged arrays for each of the receivers."""
        from threadpoolctl import threadpool_limits  # training alone, as on a machine for a GPU, does without

        del params
        uploads = worker.shared
        assert isinstance(uploads, RoundUploads)
        with threadpool_limits(limits=1, user_api="blas"):
            return worker.algorithm.merge_here(uploads, self.names, self.merges, in_turn)


def merge_on_pool(
    step: int,
    uploads: RoundUploads,
    names: Sequence[str],
    merges: Sequence[Merge],
    num_actors: int,
    run: Callable[[Sequence[MergeTask], RoundUploads], Mapping[int, dict[str, np.ndarray]]],
) -> list[dict[str, np.ndarray]]:
    """Merge on the workers of a pool.

    Args:
        step: position of the stage in the run.
        uploads: of the round. The workers get the uploads and what their senders had received.
        names: the parameters to merge.
        merges: of which every receiver is another client.
        num_actors: of the pool.
        run: runs tasks with what they share, and returns ``{receiver: arrays}``.

    Returns:
        The merged arrays in the order of ``merges``.
    """
    received = {client: uploads.received[client] for client in uploads.by_client}
    shared = replace(uploads, states=(), received=received, run_merges=None)
    size = math.ceil(len(merges) / (TASKS_PER_ACTOR * num_actors))
    parts = [tuple(merges[first : first + size]) for first in range(0, len(merges), size)]
    tasks = [MergeTask(step, tuple(m.receiver for m in part), {}, tuple(names), part) for part in parts]
    merged = run(tasks, shared)
    return [merged[merge.receiver] for merge in merges]

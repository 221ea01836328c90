"""Where tasks run: the protocol that the coordinator uses.

`sylva_ray.execution.ray.pool` and `sylva_ray.execution.in_process` implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.tasks import CohortTask

WHAT_WOULD_FIT = (
    "one image at a time does not fit: an actor needs more memory (a larger cluster.gpus_per_actor, or fewer actors "
    "on a node), or a smaller training.cohort_size, training.batch_size or backbone"
)
"""The end of the message of a run whose tasks do not fit the memory."""

OnDone = Callable[[CohortTask, CohortResult[Any]], None]
"""Called with a finished task and its result."""


class ClientPool(Protocol):
    """Workers that run any task of any cohort.

    Attributes:
        num_actors: how many workers there are.
    """

    num_actors: int

    def run(
        self,
        tasks: Sequence[CohortTask],
        deadline_s: float | None = None,
        on_done: OnDone | None = None,
        shared: object = None,
    ) -> list[CohortResult[Any] | None]:
        """Run tasks, which the caller has put in descending order of their length.

        Args:
            tasks: to run.
            deadline_s: wall seconds after which unfinished tasks count as missing; None: no deadline.
            on_done: called with every finished task and its result, as they arrive.
            shared: what all these tasks need (`CohortWorker.shared`), sent once to every machine.

        Returns:
            The results in the order of the tasks, None for a missing one.

        Raises:
            RunError: a task raised an exception, or its worker failed too often; the message names stage, step and
                clients.
        """
        ...

    def reduce_windows(self, windows: Mapping[str, int]) -> None:
        """Let all workers hold at most so many images from the next task on, ``{pass: images}``."""
        ...

    def close(self) -> None:
        """Release the workers."""
        ...

"""Where tasks run. The coordinator sees this protocol only; `sylva_ray.execution.ray.pool` is the other implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.tasks import CohortTask

OnDone = Callable[[CohortTask, CohortResult], None]


class ClientPool(Protocol):
    """Workers that run any task of any cohort."""

    num_actors: int

    def run(
        self, tasks: Sequence[CohortTask], deadline_s: float | None = None, on_done: OnDone | None = None
    ) -> list[CohortResult | None]:
        """Run ``tasks`` (longest first, as the caller ordered them); results in the same order.

        Args:
            deadline_s: wall seconds after which what is not done counts as missing (its result is None).
            on_done: called with each finished task and its result, as they arrive.

        Raises:
            RunError: a task failed by its own exception, or its worker died too often; names stage, round and clients.
        """
        ...

    def close(self) -> None:
        """Give the workers back."""
        ...

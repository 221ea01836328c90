"""`ClientPool` in this process, for debugging, tests, exact comparisons, and runs without a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sylva_ray.core.errors import OutOfMemoryError, RunError
from sylva_ray.core.failures import release_memory
from sylva_ray.federation.client.worker import CohortResult, CohortWorker
from sylva_ray.federation.pool import WHAT_WOULD_FIT, OnDone
from sylva_ray.federation.tasks import CohortTask


class InProcessPool:
    """A single worker in this process, which runs the tasks one after the other and has no deadline.

    Args:
        worker: the worker.
    """

    num_actors = 1

    def __init__(self, worker: CohortWorker) -> None:
        self.worker = worker

    def run(
        self,
        tasks: Sequence[CohortTask],
        deadline_s: float | None = None,
        on_done: OnDone | None = None,
        shared: object = None,
    ) -> list[CohortResult[Any] | None]:
        """Run tasks as `ClientPool.run` does; ``deadline_s`` is ignored."""
        del deadline_s
        results: list[CohortResult[Any] | None] = []
        for task in tasks:
            result = self._run(task, shared)
            results.append(result)
            if on_done is not None:
                on_done(task, result)
        return results

    def _run(self, task: CohortTask, shared: object) -> CohortResult[Any]:
        """Run a task; one that does not fit the memory again, in windows of half the images that passed at once."""
        while True:
            try:
                return self.worker.run(task, shared)
            except OutOfMemoryError as error:
                if not error.windows:
                    raise RunError(f"{task.where}: {error}; {WHAT_WOULD_FIT}") from None
                self.worker.model.windows.reduce(error.windows)
            except Exception as error:
                raise RunError(f"{task.where}: {type(error).__name__}: {error}") from error
            release_memory()

    def reduce_windows(self, windows: Mapping[str, int]) -> None:
        """Let the worker hold at most so many images, ``{pass: images}``."""
        self.worker.model.windows.reduce(windows)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

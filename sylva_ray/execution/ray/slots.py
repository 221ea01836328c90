"""The actors of a `RayPool`, as the pool sees them: what each is busy with, whether it hangs, and why it was lost.

The pool asks busy actors for a sign of life (`Slot.listen`). The answers tell a process that does not answer from one
that answers and computes nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayActorError, RayError
from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError

from sylva_ray.config.training import Windows
from sylva_ray.core.errors import DeviceError, OutOfMemoryError
from sylva_ray.execution.ray.client_actor import Progress
from sylva_ray.execution.ray.session import live_nodes


@dataclass
class Slot:
    """An actor of the pool.

    Attributes:
        actor: the handle.
        pending: what it is busy with, its start or the task ``job``; None: it is free.
        windows: those that it was started with.
        node: id of its node; None: it has not started yet.
        process: its process id there; None: it has not started yet.
        job: number of its task; None: it has none.
        busy_since: when it got its task.
        question: that it has not answered yet; None: there is none.
        asked: when it was asked.
        progress: its newest answer about the present task; None: there is none.
        moved: when the number of its passes was first known to be that of ``progress``.
        idle_s: for how many seconds, at least, it has begun no pass.
    """

    actor: ActorHandle[Any]
    pending: ray.ObjectRef[Any] | None
    windows: Windows
    node: str | None = None
    process: int | None = None
    job: int | None = None
    busy_since: float = 0.0
    question: ray.ObjectRef[Progress] | None = None
    asked: float = 0.0
    progress: Progress | None = None
    moved: float = 0.0
    idle_s: float = 0.0

    @property
    def has_started(self) -> bool:
        """Whether the actor takes tasks."""
        return self.node is not None

    def give(self, job: int, pending: ray.ObjectRef[Any], now: float) -> None:
        """Note that the actor got a task."""
        self.job, self.pending, self.busy_since = job, pending, now
        self.question, self.progress, self.idle_s = None, None, 0.0

    def listen(self, now: float) -> None:
        """Read the answer to the last question, if it is there, and ask the next one."""
        if self.question is not None and ray.wait([self.question], timeout=0)[0]:
            with contextlib.suppress(RayError):  # the actor is lost, as the pool hears by other ways
                self._note(ray.get(self.question), now)
            self.question = None
        if self.question is None:
            self.question, self.asked = self.actor.progress.remote(), now

    def _note(self, progress: Progress, now: float) -> None:
        """Note an answer to the question that was asked at ``asked``."""
        if self.progress is None or progress.num_passes != self.progress.num_passes:
            self.moved = now
        self.idle_s = max(0.0, self.asked - self.moved)
        self.progress = progress

    def silent_s(self, now: float) -> float:
        """Return for how many seconds a question has waited for its answer."""
        return 0.0 if self.question is None else now - self.asked

    def kill_process(self) -> None:
        """Kill its process if it is on this machine; a stopped one does not hear Ray, which kills the others."""
        if self.process is not None and self.node == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)


@dataclass(frozen=True)
class Loss:
    """Why an actor was lost.

    Attributes:
        reason: in words.
        with_node: whether a machine was lost, not only a process.
        is_hopeless: whether another actor would be lost in the same way.
        by_memory: whether the memory was too small, so that smaller windows may help.
        is_unexplained: whether a process ended without a word, as one does that the system kills for its memory.
        windows: with which the task may fit, ``{pass: images}``; empty: with none; None: that is not known.
    """

    reason: str
    with_node: bool = False
    is_hopeless: bool = False
    by_memory: bool = False
    is_unexplained: bool = False
    windows: Mapping[str, int] | None = None

    @classmethod
    def from_cause(cls, cause: OutOfMemoryError | DeviceError) -> Loss:
        """Return the loss of an actor whose task did not fit, or whose GPU failed: its process is not used again."""
        if isinstance(cause, OutOfMemoryError):
            return cls(str(cause), by_memory=True, windows=cause.windows)
        return cls(str(cause))

    @classmethod
    def from_error(cls, slot: Slot, error: RayError) -> Loss:
        """Return the loss that Ray reports. It notices a lost connection seconds before a lost node."""
        with_node = isinstance(error, ActorUnavailableError | NodeDiedError)
        with_node |= isinstance(error, RayActorError) and error.preempted
        with_node |= slot.node is not None and slot.node not in {node["NodeID"] for node in live_nodes()}
        is_hopeless = isinstance(error, RayActorError) and error.actor_init_failed
        by_memory = isinstance(error, RayOutOfMemoryError) or "running low on memory" in str(error)
        is_unexplained = isinstance(error, RayActorError) and not (with_node or is_hopeless or by_memory)
        windows = slot.progress.smaller or None if slot.progress is not None else None
        return cls(str(error).strip().splitlines()[-1], with_node, is_hopeless, by_memory, is_unexplained, windows)

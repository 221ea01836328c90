"""What a run tells about itself while it goes on: to the terminal, to ``rounds.jsonl``, to MLflow, to a remote copy.

An `Observer` overrides the methods that it cares about. Events are plain frozen data, so that they can cross a process
border: the coordinator keeps them in an `EventLog`, and the driver passes them to its display with `tell`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sylva_ray.core.records import StageRecord

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended; ``KILLED``: it was interrupted and can be resumed."""


@dataclass(frozen=True)
class StageStarted:
    """A stage begins.

    Attributes:
        step: position of the stage in the run, from 0.
        num_steps: stages of the run.
        title: of the stage, for people.
    """

    step: int
    num_steps: int
    title: str


@dataclass(frozen=True)
class TaskDone:
    """A worker has finished a task.

    Attributes:
        work: what the task is part of, e.g. ``training``.
        num_clients: clients in the task.
    """

    work: str
    num_clients: int


@dataclass(frozen=True)
class Notice:
    """Something that a person should know.

    Attributes:
        text: one sentence, without a full stop.
    """

    text: str


Event: TypeAlias = StageStarted | TaskDone | StageRecord | Notice


class Observer:
    """Observes a run. Every method does nothing until it is overridden."""

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """Hear that a run continues after ``records``."""

    def on_stage(self, started: StageStarted) -> None:
        """Hear that a stage begins."""

    def on_task(self, done: TaskDone) -> None:
        """Hear that a task is done."""

    def on_record(self, record: StageRecord) -> None:
        """Hear that a stage is done and its checkpoint written."""

    def on_notice(self, notice: Notice) -> None:
        """Hear of something that a person should know."""

    def on_end(self, status: Status) -> list[str]:
        """Hear that the run has ended.

        Returns:
            Warnings for ``summary.json``.
        """
        del status
        return []


class Observers(Observer):
    """Passes everything on to several observers, in their order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = list(observers)

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """See `Observer.on_resume`."""
        for observer in self.observers:
            observer.on_resume(records)

    def on_stage(self, started: StageStarted) -> None:
        """See `Observer.on_stage`."""
        for observer in self.observers:
            observer.on_stage(started)

    def on_task(self, done: TaskDone) -> None:
        """See `Observer.on_task`."""
        for observer in self.observers:
            observer.on_task(done)

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        for observer in self.observers:
            observer.on_record(record)

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        for observer in self.observers:
            observer.on_notice(notice)

    def on_end(self, status: Status) -> list[str]:
        """See `Observer.on_end`."""
        return [warning for observer in self.observers for warning in observer.on_end(status)]


class EventLog(Observer):
    """Keeps the events of a run in ``events``, for a display in another process."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_stage(self, started: StageStarted) -> None:
        """See `Observer.on_stage`."""
        self.events.append(started)

    def on_task(self, done: TaskDone) -> None:
        """See `Observer.on_task`."""
        self.events.append(done)

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        self.events.append(record)

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self.events.append(notice)


def tell(observer: Observer, event: Event) -> None:
    """Call the method of ``observer`` that ``event`` belongs to."""
    match event:
        case StageStarted():
            observer.on_stage(event)
        case TaskDone():
            observer.on_task(event)
        case StageRecord():
            observer.on_record(event)
        case Notice():
            observer.on_notice(event)

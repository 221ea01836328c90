"""The observers of a run: the display, ``rounds.jsonl``, MLflow and the copy at a URL follow its progress.

An `Observer` overrides the methods that it needs. Events are frozen data, so that they can be sent to another process:
the coordinator collects them in an `EventLog`, and the driver gives them to its display with `dispatch`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sylva_ray.core.errors import reason_of
from sylva_ray.core.records import StageRecord

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended; ``KILLED``: it was interrupted and can be resumed."""


@dataclass(frozen=True)
class StageStarted:
    """The event that a stage begins.

    Attributes:
        step: position of the stage in the run, from 0.
        num_steps: stages of the run.
        title: what is displayed.
    """

    step: int
    num_steps: int
    title: str


@dataclass(frozen=True)
class TaskDone:
    """The event that a worker has finished a task.

    Attributes:
        work: what the task is part of, e.g. ``training``.
        num_clients: clients in the task.
        done: clients of this and all earlier tasks that were given to the workers together with it.
        total: clients of all these tasks.
    """

    work: str
    num_clients: int
    done: int
    total: int


@dataclass(frozen=True)
class Notice:
    """A message to the user, e.g. that a worker was lost.

    Attributes:
        text: one sentence, without a full stop.
    """

    text: str


Event: TypeAlias = StageStarted | TaskDone | StageRecord | Notice


class Observer:
    """Observes a run. The methods of this class do nothing."""

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """Handle that a run continues after the stages in ``records``; a run that starts has none.

        Files of an earlier start may be there all the same: it was stopped before its first checkpoint was complete.
        """

    def on_stage(self, started: StageStarted) -> None:
        """Handle that a stage begins."""

    def on_task(self, done: TaskDone) -> None:
        """Handle that a task has finished."""

    def on_record(self, record: StageRecord) -> None:
        """Handle that a stage has finished and its checkpoint is written."""

    def on_notice(self, notice: Notice) -> None:
        """Handle a message to the user."""

    def on_end(self, status: Status) -> list[str]:
        """Handle the end of the run.

        Args:
            status: how it ended.

        Returns:
            Warnings for ``summary.json``.
        """
        del status
        return []


class Observers(Observer):
    """Passes every event on to several observers, in their order.

    Args:
        observers: the observers.
    """

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
        """See `Observer.on_end`. An observer that raises here is a warning: the others, and the run, still end."""
        warnings = []
        for observer in self.observers:
            try:
                warnings += observer.on_end(status)
            except Exception as error:
                warnings.append(_failure(observer, error))
        return warnings


class Guarded(Observer):
    """Passes events on to a display until it raises an error, which does not end the run.

    The error is printed on standard error, and is a warning of the run; further events are not passed on. Other
    observers end the run with their errors, because what they do is part of it: they write its files.

    Args:
        display: the observer that only shows the run.
    """

    def __init__(self, display: Observer) -> None:
        self.display = display
        self.problem = ""

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """See `Observer.on_resume`."""
        self._tell(lambda: self.display.on_resume(records))

    def on_stage(self, started: StageStarted) -> None:
        """See `Observer.on_stage`."""
        self._tell(lambda: self.display.on_stage(started))

    def on_task(self, done: TaskDone) -> None:
        """See `Observer.on_task`."""
        self._tell(lambda: self.display.on_task(done))

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        self._tell(lambda: self.display.on_record(record))

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self._tell(lambda: self.display.on_notice(notice))

    def on_end(self, status: Status) -> list[str]:
        """See `Observer.on_end`."""
        warnings: list[str] = []
        self._tell(lambda: warnings.extend(self.display.on_end(status)))
        return [*warnings, *([self.problem] if self.problem else [])]

    def _tell(self, tell: Callable[[], None]) -> None:
        if self.problem:
            return
        try:
            tell()
        except Exception as error:
            self.problem = f"{_failure(self.display, error)}; the run went on without it"
            print(f"warning: {self.problem}", file=sys.stderr)


def _failure(observer: Observer, error: Exception) -> str:
    return f"the observer {type(observer).__name__} failed ({type(error).__name__}: {reason_of(error)})"


class EventLog(Observer):
    """Collects the events of a run for a display in another process.

    Attributes:
        events: the oldest first.
    """

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


def dispatch(observer: Observer, event: Event) -> None:
    """Call the method of ``observer`` for an event."""
    match event:
        case StageStarted():
            observer.on_stage(event)
        case TaskDone():
            observer.on_task(event)
        case StageRecord():
            observer.on_record(event)
        case Notice():
            observer.on_notice(event)

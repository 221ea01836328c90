"""What a sweep tells while it runs, to the terminal and in the history of each trial on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

Outcome = Literal["finished", "pruned", "refused", "died"]
"""How an attempt at a trial ended; an attempt that died is repeated (``trials.retries``)."""


class AttemptEvent(BaseModel):
    """A line of a trial's history ``attempts/POINT-sSEED.jsonl``: keys without a value are absent, times Unix seconds.

    Attributes:
        began: when the attempt began; identifies the attempt.
        process: of its coordinator, in the first line of an attempt.
        node: Ray's id of the coordinator's node, in the first line of an attempt.
        alive: when it did a ``step`` or had a ``notice``.
        step: the last step of the experiment that is done.
        notice: what a person should know, e.g. that a worker was lost.
        ended: when the attempt ended; absent where it was killed.
        outcome: how it ended; ``pruned`` also without ``ended``, when Tune has decided it.
        error: why it died or was refused; else empty.
    """

    model_config = ConfigDict(frozen=True)

    began: float
    process: int | None = None
    node: str | None = None
    alive: float | None = None
    step: int | None = None
    notice: str | None = None
    ended: float | None = None
    outcome: Outcome | None = None
    error: str | None = None


@dataclass(frozen=True)
class SweepStarted:
    """The trials are about to start.

    Attributes:
        num_trials: all trials of the sweep.
        finished: keys of those that finished before the sweep was resumed.
    """

    num_trials: int
    finished: Sequence[str]


@dataclass(frozen=True)
class TrialProgress:
    """A new line in a trial's history.

    Attributes:
        key: the trial.
        event: the line.
    """

    key: str
    event: AttemptEvent


@dataclass(frozen=True)
class Waiting:
    """No trial runs.

    Attributes:
        text: what the sweep waits for.
    """

    text: str


@dataclass(frozen=True)
class SweepWarning:
    """Something went wrong that does not stop the sweep.

    Attributes:
        text: one sentence, without a full stop.
    """

    text: str


SweepEvent: TypeAlias = SweepStarted | TrialProgress | Waiting | SweepWarning
OnEvent: TypeAlias = Callable[[SweepEvent], None]

"""The progress of ``sylva-ray evaluate`` as lines: tasks of every measurement that are done, and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sylva_ray.core.evaluation import Evaluation
from sylva_ray.core.text import LogFormat, duration
from sylva_ray.federation.observer import Notice, Observer
from sylva_ray.reports.event_lines import EventLines

NUM_LINES = 10
"""Lines about the tasks of one measurement, at most; further parts of it have as many of their own."""


@dataclass
class TaskCount:
    """The tasks of one measurement.

    Attributes:
        name: of the measurement.
        total: all tasks that are known so far.
        done: those that are finished, the ones on disk included.
        computed: those that this process has finished.
    """

    name: str
    total: int = 0
    done: int = 0
    computed: int = 0
    _started: float = field(default_factory=time.perf_counter)

    def begin(self, num_tasks: int, num_known: int) -> str:
        """Add tasks, some of which are on disk already; return that as a sentence."""
        self.total += num_tasks
        self.done += num_known
        return f"{self.name}: {num_tasks} tasks" + (f" ({num_known} already on disk)" if num_known else "")

    def finish(self) -> bool:
        """Count a task; return whether it is one of those that are worth a line."""
        before = self.done
        self.done += 1
        self.computed += 1
        return NUM_LINES * before // self.total < NUM_LINES * self.done // self.total

    @property
    def seconds(self) -> float:
        """Since the first task was known."""
        return time.perf_counter() - self._started

    @property
    def seconds_left(self) -> float:
        """That the other tasks may take, if they take as long as those so far."""
        return self.seconds / max(self.computed, 1) * (self.total - self.done)

    def __str__(self) -> str:
        eta = f"  eta {duration(self.seconds_left)}" if self.done < self.total else ""
        return f"{self.name}: {self.done}/{self.total} tasks  {self.seconds:.1f} s{eta}"


class EvaluationLog(Observer):
    """Writes a line for every measurement, and for some or all of its finished tasks.

    Args:
        write: takes a line without its end.
        form: of the lines, see `EventLines`; None: sentences without time stamps. Events are ``measurement``, ``task``,
            ``notice`` and ``result``.
        tasks: whether every finished task is a line; else `NUM_LINES` of a measurement are.
    """

    def __init__(self, write: Callable[[str], None], form: LogFormat | None = None, tasks: bool = False) -> None:
        self._write, self._lines, self._tasks = write, EventLines(write, form) if form else None, tasks
        self._counts: dict[str, TaskCount] = {}

    def on_measurement(self, name: str, num_tasks: int, num_known: int) -> None:
        """See `sylva_ray.evaluation.measurements.Progress.on_measurement`."""
        count = self._counts.setdefault(name, TaskCount(name))
        sentence = count.begin(num_tasks, num_known)
        self._tell("measurement", sentence, name=name, tasks=num_tasks, known=num_known)

    def on_task_measured(self, name: str) -> None:
        """See `sylva_ray.evaluation.measurements.Progress.on_task_measured`."""
        count = self._counts[name]
        if count.finish() or self._tasks:
            seconds = {"seconds": round(count.seconds, 1), "seconds_left": round(count.seconds_left, 1)}
            self._tell("task", str(count), name=name, done=count.done, total=count.total, **seconds)

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self._tell("notice", notice.text, text=notice.text)

    def tell_result(self, evaluation: Evaluation, file: str) -> None:
        """Write the mean accuracies under every attack, failed checks, and the path of the results."""
        accuracy = {"benign": evaluation.benign.accuracy.mean}
        accuracy |= {name: row.accuracy.mean for name, row in evaluation.attacks.items()}
        worst = {name: row.accuracy.mean for name, row in evaluation.worst_case.items()}
        failed = [check.name for check in evaluation.checks or () if not check.passed]
        values = {"run": evaluation.run, "accuracy": accuracy, "worst_case": worst, "failed": failed}
        self._tell("result", f"finished: {file}", file=file, **values)

    def _tell(self, event: str, sentence: str, **values: object) -> None:
        if self._lines is None:
            self._write(sentence)
        else:
            self._lines.tell(event, sentence, **values)

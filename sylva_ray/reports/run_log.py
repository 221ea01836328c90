"""The events of a run as lines with time stamps: ``run.log`` in its folder, and ``--log-format`` on the terminal."""

from __future__ import annotations

from collections.abc import Callable

from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Summary
from sylva_ray.core.text import LogFormat
from sylva_ray.federation.observer import Notice, Observer, StageStarted, TaskDone
from sylva_ray.reports.event_lines import EventLines
from sylva_ray.reports.progress import Pace, mean_metrics, stage_lines, task_text
from sylva_ray.storage.run_folder import RunFolder


class RunLog(Observer):
    """Writes one line per event.

    Args:
        write: takes a line without its end.
        form: ``plain``: a time stamp and a sentence; ``json``: an object with the keys ``time`` (ISO 8601, UTC) and
            ``event`` (``stage``, ``task``, ``record``, ``notice`` or ``result``).
        tasks: whether every finished task is a line, too.
    """

    def __init__(self, write: Callable[[str], None], form: LogFormat = "plain", tasks: bool = False) -> None:
        self._lines, self._tasks = EventLines(write, form), tasks
        self._stage = StageStarted(0, 0, "")
        self._pace = Pace()

    def on_stage(self, started: StageStarted) -> None:
        """See `Observer.on_stage`."""
        self._stage = started
        self._pace.start(started.step)
        self._lines.tell("stage", f"begin {started.title}", **self._position())

    def on_task(self, done: TaskDone) -> None:
        """See `Observer.on_task`."""
        if self._tasks:
            self._lines.tell("task", task_text(done), work=done.work, done=done.done, total=done.total)

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        left = self._pace.seconds_left(self._stage)
        seconds = {"seconds": record.seconds["wall"], "seconds_left": round(left, 1)}
        (line,) = stage_lines(self._stage, record, left)
        self._lines.tell("record", line, **self._position(), stage=record.stage, **seconds, **mean_metrics(record))

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self._lines.tell("notice", notice.text, text=notice.text)

    def tell_result(self, summary: Summary, run: str) -> None:
        """Write the mean accuracies at the end of a run, its seconds, failed checks, and the path of its folder."""
        final = summary.final
        robust = {name: spread.mean for name, spread in final.robust_accuracy.items()}
        failed = [check.name for check in summary.checks if not check.passed]
        accuracies = {"benign_accuracy": final.benign_accuracy.mean, "robust_accuracy": robust}
        self._lines.tell(
            "result", f"finished: {run}", run=run, seconds=summary.seconds.total, failed=failed, **accuracies
        )

    def _position(self) -> dict[str, object]:
        return {"step": self._stage.step, "steps": self._stage.num_steps, "title": self._stage.title}


class RunLogFile(RunLog):
    """Writes ``run.log``, to which a resume adds. Nothing is written before the folder is claimed by its config.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(self._append, tasks=True)
        self._folder = folder
        self._waiting: list[str] = []

    def _append(self, line: str) -> None:
        self._waiting.append(line)
        if self._folder.config_file.exists():
            with self._folder.log_file.open("a", encoding="utf-8") as file:
                file.writelines(f"{waiting}\n" for waiting in self._waiting)
            self._waiting.clear()

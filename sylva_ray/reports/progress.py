"""The progress of runs and evaluations: bars that fit the terminal, and one line per stage that stays.

Where the output is no terminal, there are lines only, which also have numbers and times.
"""

from __future__ import annotations

import time
from statistics import fmean
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from sylva_ray.core.records import StageRecord
from sylva_ray.core.text import duration
from sylva_ray.federation.observer import Notice, Observer, StageStarted, TaskDone
from sylva_ray.metrics.checks import UNBOUNDED
from sylva_ray.reports.console import print_lines
from sylva_ray.reports.evaluation_log import EvaluationLog

WIDTH_WITH_BAR = 80
"""Smallest width of a terminal on which there is room for a bar beside the words."""


class Display:
    """Progress bars, shown on a terminal only; a context manager.

    Args:
        console: where to print.
        quiet: whether to show neither bars nor lines about progress; `print_line` still prints.
        columns: columns of a bar after its description, the bar and the count.
    """

    def __init__(self, console: Console, quiet: bool, *columns: ProgressColumn) -> None:
        self.console = console
        self._live = console.is_terminal and not quiet
        self._plain = not self._live and not quiet
        bar = [BarColumn(bar_width=None, table_column=Column(ratio=1))] if console.width >= WIDTH_WITH_BAR else []
        first_columns = (SpinnerColumn(), shortened_column("{task.description}"), *bar, MofNCompleteColumn())
        self._progress = Progress(
            *first_columns, *columns, console=console, disable=not self._live, expand=True, transient=True
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def print_line(self, line: str) -> None:
        """Print a line above the bars."""
        print_lines(self.console, [line])

    def print_fitting(self, line: str) -> None:
        """Print a line above the bars, on a terminal cut to its width."""
        if self._live:
            self.console.print(Text(line), no_wrap=True, overflow="ellipsis", highlight=False)
        else:
            self.print_line(line)


def shortened_column(text: str) -> TextColumn:
    """Return a column whose text ends with an ellipsis where the terminal has no room for it."""
    return TextColumn(text, table_column=Column(ratio=2, no_wrap=True, overflow="ellipsis"))


class RunDisplay(Display, Observer):
    """Shows the progress of a run: one line per finished stage, and on a terminal a bar over all stages.

    Args:
        console: where to print.
        quiet: whether to show notices only.
        verbose: whether every finished task is a line, too.
    """

    def __init__(self, console: Console, quiet: bool, verbose: bool = False) -> None:
        detail = [shortened_column("{task.fields[detail]}")] if console.width >= WIDTH_WITH_BAR else []
        super().__init__(console, quiet, *detail, TimeElapsedColumn(), TextColumn("{task.fields[eta]}"))
        self._bar = self._progress.add_task("starting", total=None, detail="", eta="")
        self._verbose = verbose and not quiet
        self._stage = StageStarted(0, 0, "starting")
        self._pace = Pace()

    def on_stage(self, started: StageStarted) -> None:
        """See `Observer.on_stage`."""
        self._stage = started
        self._pace.start(started.step)
        self._progress.update(self._bar, total=started.num_steps, completed=started.step, description=started.title)
        self._progress.update(self._bar, detail="")

    def on_task(self, done: TaskDone) -> None:
        """See `Observer.on_task`."""
        text = task_text(done)
        self._progress.update(self._bar, detail=text)
        if self._verbose:
            self.print_fitting(f"         {text}")

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        left = self._pace.seconds_left(self._stage)
        self._progress.advance(self._bar)
        self._progress.update(self._bar, detail="", eta=f"eta {duration(left)}" if left else "")
        if self._live or self._plain:
            for line in stage_lines(self._stage, record, left, self.console.width if self._live else None):
                self.print_line(line)

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self.print_line(notice.text)


class Pace:
    """How long the rest of a run will take if its stages take as long as those so far."""

    def __init__(self) -> None:
        self._first_step: int | None = None

    def start(self, step: int) -> None:
        """Begin with the first stage that this process sees; later calls change nothing."""
        if self._first_step is None:
            self._first_step, self._started = step, time.perf_counter()

    def seconds_left(self, finished: StageStarted) -> float:
        """Return the seconds that the stages after ``finished`` may take."""
        assert self._first_step is not None, "a stage starts before it ends"
        done = finished.step + 1 - self._first_step
        return (time.perf_counter() - self._started) / done * (finished.num_steps - finished.step - 1)


def stage_lines(stage: StageStarted, record: StageRecord, seconds_left: float, width: int | None = None) -> list[str]:
    """Return what remains on the screen of a stage: its number, its title, seconds, time left, what was measured.

    Args:
        stage: what was said at its start.
        record: what it resulted in.
        seconds_left: of the stages after it.
        width: of the terminal; what was measured has lines of its own where one does not hold all. None: one line.
    """
    count = f"{stage.step + 1:>{len(str(stage.num_steps))}}/{stage.num_steps}"
    eta = f"  eta {duration(seconds_left)}" if stage.step + 1 < stage.num_steps else ""
    line = f"{count}  {stage.title:<29} {record.seconds['wall']:6.1f} s{eta}"
    numbers = record_numbers(record)
    if not numbers:
        return [line]
    whole = "  ".join([line, *numbers])
    if width is None or len(whole) <= width:
        return [whole]
    indent = " " * (len(count) + 2)
    lines = [line]
    for number in numbers:
        fits = len(lines) > 1 and len(lines[-1]) + 2 + len(number) <= width
        lines[-1:] = [f"{lines[-1]}  {number}"] if fits else [lines[-1], indent + number]
    return lines


def mean_metrics(record: StageRecord) -> dict[str, dict[str, float]]:
    """Return means over the honest clients: metrics of the stage such as ``loss``, accuracy under every condition."""
    metrics = {name: fmean(values) for name in record.metrics if (values := record.counted_metric(name))}
    conditions = (record.evaluation or {}).items()
    accuracy = {name: fmean(values) for name, found in conditions if (values := record.counted(found.accuracy))}
    return {"metrics": metrics, "accuracy": accuracy}


def record_numbers(record: StageRecord) -> list[str]:
    """Return mean loss and mean accuracies of a record as texts; ``unbounded`` is the attack of check S4."""
    means = mean_metrics(record)
    parts = [f"loss {means['metrics']['loss']:.3f}"] if "loss" in means["metrics"] else []
    accuracies = {{UNBOUNDED.label: "unbounded"}.get(name, name): value for name, value in means["accuracy"].items()}
    return parts + [f"{condition} {value:.1%}" for condition, value in accuracies.items()]


def task_text(done: TaskDone) -> str:
    """Return how many of the clients that work was given out for are done.

    >>> task_text(TaskDone("train", num_clients=2, done=4, total=6))
    'train: 4 of 6 clients'
    """
    return f"{done.work}: {done.done} of {done.total} clients"


class EvaluationDisplay(Display, Observer):
    """Shows the progress of `sylva-ray evaluate`: a bar for what is measured now, and a line for what was measured.

    Args:
        console: where to print.
        quiet: whether to show notices only.
        verbose: whether every finished task is a line, too.
    """

    def __init__(self, console: Console, quiet: bool = False, verbose: bool = False) -> None:
        super().__init__(console, quiet, TimeElapsedColumn())
        self._bars: dict[str, TaskID] = {}
        has_lines = self._plain or (verbose and not quiet)
        self._log = EvaluationLog(self.print_fitting, tasks=verbose) if has_lines else None

    def __exit__(self, *exception: object) -> None:
        self._end_finished()
        super().__exit__(*exception)

    def on_measurement(self, name: str, num_tasks: int, num_known: int) -> None:
        """See `sylva_ray.evaluation.measurements.Progress.on_measurement`."""
        if name not in self._bars:
            self._end_finished()
            self._bars[name] = self._progress.add_task(name, total=0)
        bar = self._task(name)
        total = (bar.total or 0) + num_tasks
        self._progress.update(self._bars[name], total=total, completed=bar.completed + num_known)
        if self._log is not None:
            self._log.on_measurement(name, num_tasks, num_known)

    def on_task_measured(self, name: str) -> None:
        """See `sylva_ray.evaluation.measurements.Progress.on_task_measured`."""
        self._progress.advance(self._bars[name])
        if self._log is not None:
            self._log.on_task_measured(name)

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self.print_line(notice.text)

    def _task(self, name: str) -> Task:
        return next(task for task in self._progress.tasks if task.id == self._bars[name])

    def _end_finished(self) -> None:
        """Put a line in the place of every bar that is full, so that the one in use stays visible."""
        for name in list(self._bars):
            bar = self._task(name)
            if bar.finished:
                self._progress.remove_task(self._bars.pop(name))
                if self._live:
                    self.print_line(f"{name}  {bar.completed:.0f} tasks  {bar.finished_time or 0:.1f} s")

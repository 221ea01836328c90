"""What the terminal shows of a sweep: a bar of trials, and the closing table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import TimeElapsedColumn
from rich.table import Table

from sylva_ray.core.text import LogFormat
from sylva_ray.reports.compare.rows import short_key
from sylva_ray.reports.console import print_lines, wrapped
from sylva_ray.reports.event_lines import EventLines
from sylva_ray.reports.output import Output
from sylva_ray.reports.progress import Display, shortened_column
from sylva_ray.reports.terminal import LINE_INDENT, first_that_fits
from sylva_ray.sweeps.events import (
    AttemptEvent,
    OnEvent,
    SweepEvent,
    SweepStarted,
    SweepWarning,
    TrialProgress,
    Waiting,
)
from sylva_ray.sweeps.metrics import COSTS
from sylva_ray.sweeps.points import value_text
from sylva_ray.sweeps.results import Sweep, shown_metrics, value_cell


@contextmanager
def observing_sweep(console: Console, output: Output) -> Iterator[OnEvent]:
    """Yield what shows the events of a sweep on the terminal."""
    verbose = output.show == "tasks"
    if output.log_format is not None and output.has_progress:
        yield SweepLog(partial(print, flush=True), output.log_format, verbose).on_event
        return
    with SweepDisplay(console, not output.has_progress, verbose) as display:
        yield display.on_event


def print_sweep(console: Console, output: Output, sweep: Sweep, sweep_dir: Path) -> None:
    """Print the closing table and lines of a sweep, or the JSON object that stands for them."""
    if output.log_format == "json":
        if output.show != "nothing":
            SweepLog(print, "json").tell_result(sweep, sweep_dir)
        return
    console.print(sweep_table(console, sweep))
    print_lines(console, wrapped(console, sweep_lines(sweep, sweep_dir), LINE_INDENT))


class SweepLog:
    """Writes a line for every event of a sweep.

    Args:
        write: takes a line without its end.
        form: of the lines, see `EventLines`. Events are ``sweep``, ``trial``, ``step``, ``notice`` and ``result``.
        steps: whether every step of a trial is a line, too.
    """

    def __init__(self, write: Callable[[str], None], form: LogFormat, steps: bool = False) -> None:
        self._lines, self._steps = EventLines(write, form), steps
        self._num_trials = 0
        self._over: set[str] = set()

    def on_event(self, event: SweepEvent) -> None:
        """Write an event."""
        match event:
            case SweepStarted(num_trials, finished):
                self._num_trials, self._over = num_trials, set(finished)
                sentence = f"{len(finished)} of {num_trials} trials have finished before"
                self._lines.tell("sweep", sentence, trials=num_trials, done=len(finished))
            case SweepWarning(text) | Waiting(text):
                self._lines.tell("notice", text, text=text)
            case TrialProgress(key, line):
                self._tell_trial(key, line)

    def _tell_trial(self, key: str, event: AttemptEvent) -> None:
        if event.notice is not None:
            self._lines.tell("notice", f"trial {key}: {event.notice}", trial=key, text=event.notice)
        elif event.ended is not None:
            self._over |= {key} if event.outcome != "died" else set()
            values = {"outcome": event.outcome, "seconds": round(event.ended - event.began, 1), "error": event.error}
            count = {"done": len(self._over), "trials": self._num_trials}
            self._lines.tell(
                "trial", ended_text(key, event, len(self._over), self._num_trials), trial=key, **values, **count
            )
        elif self._steps and event.step is not None:
            self._lines.tell("step", f"trial {key}: step {event.step}", trial=key, step=event.step)

    def tell_result(self, sweep: Sweep, sweep_dir: Path) -> None:
        """Write the best points with their values and metrics, how many trials there were, and the folder."""
        chosen = [
            {"values": dict(point.values), "metrics": {name: asdict(mean) for name, mean in point.metrics.items()}}
            for point in sweep.chosen
        ]
        counts = {"trials": dict(sweep.counts), "seconds": round(sweep.seconds, 1)}
        self._lines.tell("result", f"finished: {sweep_dir}", sweep=str(sweep_dir), chosen=chosen, **counts)


def ended_text(key: str, event: AttemptEvent, done: int, num_trials: int) -> str:
    """Return how an attempt at a trial ended, and how many trials are over.

    Args:
        key: of the trial.
        event: its end.
        done: trials that are over.
        num_trials: of the sweep.
    """
    assert event.ended is not None, "an end"
    reason = f": {event.error}" if event.error else ""
    count = f"{done:>{len(str(num_trials))}}/{num_trials}"
    return f"{count}  trial {key}  {event.outcome:<9} {event.ended - event.began:6.1f} s{reason}"


class SweepDisplay(Display):
    """Shows the events of a sweep; use as a context manager.

    Args:
        console: where to print.
        quiet: whether to show warnings only.
        verbose: whether every step of a trial is a line, too.
    """

    def __init__(self, console: Console, quiet: bool, verbose: bool = False) -> None:
        super().__init__(console, quiet, shortened_column("{task.fields[detail]}"), TimeElapsedColumn())
        self._bar = self._progress.add_task("trials", total=None, detail="")
        self._verbose = verbose and not quiet
        self._num_trials = 0
        self._running: dict[str, int] = {}
        self._over: set[str] = set()

    def on_event(self, event: SweepEvent) -> None:
        """Show an event."""
        match event:
            case SweepStarted(num_trials, finished):
                self._over, self._num_trials = set(finished), num_trials
                self._progress.update(self._bar, total=num_trials, completed=len(self._over))
                if self._over and self._plain:
                    self.print_line(f"{len(self._over)} of {num_trials} trials have finished before")
            case SweepWarning(text):
                self.print_line(f"warning: {text}")
            case Waiting(text):
                self.print_line(text)
            case TrialProgress(key, line):
                self._show_trial(key, line)

    def _show_trial(self, key: str, event: AttemptEvent) -> None:
        if event.notice is not None:
            self.print_line(f"trial {key}: {event.notice}")
        elif event.ended is None and event.outcome is not None:
            pass  # pruned, and about to end
        elif event.ended is None:
            self._running[key] = event.step or 0
            if self._verbose and event.step is not None:
                self.print_fitting(f"         trial {key}: step {event.step}")
        else:
            self._running.pop(key, None)
            if event.outcome != "died":
                self._over.add(key)
            if self._plain or self._live:
                self.print_fitting(ended_text(key, event, len(self._over), self._num_trials))
        running = "  ".join(f"{name} step {step}" for name, step in self._running.items())
        self._progress.update(self._bar, completed=len(self._over), detail=running)


MAX_POINTS = 30
"""Points in the table."""


def sweep_table(console: Console, sweep: Sweep) -> Table:
    """Tabulate the best points: the swept values, the objectives, accuracies and costs, and how many seeds are done.

    A narrow console gets fewer columns: no lines between them, then no costs, then one column for all swept values.

    Args:
        console: where it will be printed.
        sweep: its results.
    """
    metrics = shown_metrics(sweep.space)
    objectives = [objective.metric for objective in sweep.space.objectives]
    few = [name for name in metrics if name in objectives or name not in COSTS]
    return first_that_fits(
        console,
        (
            _sweep_table(sweep, outline, shown, apart)
            for outline, shown, apart in [
                (box.HEAVY_HEAD, metrics, True),
                (box.SIMPLE, metrics, True),
                (box.SIMPLE, few, True),
                (box.SIMPLE, few, False),
            ]
        ),
    )


def _sweep_table(sweep: Sweep, outline: box.Box, metrics: Sequence[str], apart: bool) -> Table:
    """Return `sweep_table` with these metrics, and with the swept values apart or in one column."""
    space, num_hidden = sweep.space, len(sweep.points) - MAX_POINTS
    goals = ", ".join(f"{objective.mode} {objective.metric}" for objective in space.objectives)
    caption = f"and {num_hidden} more in sweep.json" if num_hidden > 0 else None
    table = Table(title=f"{space.name}: {goals}; accuracies in %", caption=caption, box=outline)
    keys = list(space.parameters)
    table.add_column("", justify="right", no_wrap=apart, overflow="fold")
    for key in keys if apart else ():
        table.add_column(short_key(key).replace("_", " "), justify="right", no_wrap=True)
    if not apart:
        table.add_column("point", overflow="fold")
    for name in metrics:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("seeds", justify="right", no_wrap=True)
    for point in sweep.points[:MAX_POINTS]:
        mark = "*" if point.chosen else "/".join(sorted({*point.states} - {"finished"}))
        mark += " !" if point.checks else ""
        values = [value_text(key, point.values[key]) for key in keys] if apart else [point.label]
        cells = [value_cell(name, point.metrics.get(name)) for name in metrics]
        table.add_row(escape(mark), *map(escape, values), *cells, sweep.seeds_done(point))
    return table


def sweep_lines(sweep: Sweep, sweep_dir: Path) -> list[str]:
    """Explain the marks, count the trials, and say where the files are."""
    counts = ", ".join(f"{count} {state}" for state, count in sweep.counts.items())
    several = len(sweep.space.objectives) > 1
    lines = ["*        " + ("not dominated by another point" if several else "the best point")]
    if any(point.checks for point in sweep.points):
        names = ", ".join(sorted({check for point in sweep.points for check in point.checks}))
        lines.append(f"!        a check failed ({names}): do not trust the robust accuracy (sylva-ray list checks)")
    busy = f"{100 * sweep.busy_share:.0f} % of {sweep.workers} workers' time"
    lines.append(f"trials   {counts}, in {sweep.seconds:.0f} s; computing took {busy}")
    if sweep.chosen:
        lines.append(f"configs  {sweep_dir / ('pareto' if several else 'best.yaml')}")
    return [*lines, f"report   {sweep_dir / 'report.html'}", f"sweep    {sweep_dir}"]

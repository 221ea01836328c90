"""What the terminal shows of a sweep: a bar of trials, and the closing table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import TimeElapsedColumn
from rich.table import Table

from sylva_ray.reports.compare.rows import short_key
from sylva_ray.reports.progress import Display, shortened_column
from sylva_ray.sweeps.events import AttemptEvent, SweepEvent, SweepStarted, SweepWarning, TrialProgress, Waiting
from sylva_ray.sweeps.points import value_text
from sylva_ray.sweeps.results import Sweep, shown_metrics, value_cell


class SweepDisplay(Display):
    """Shows the events of a sweep; use as a context manager.

    Args:
        console: where to print.
        quiet: whether to show warnings only.
    """

    def __init__(self, console: Console, quiet: bool) -> None:
        super().__init__(console, quiet, shortened_column("{task.fields[detail]}"), TimeElapsedColumn())
        self._bar = self._progress.add_task("trials", total=None, detail="")
        self._running: dict[str, int] = {}
        self._over: set[str] = set()

    def on_event(self, event: SweepEvent) -> None:
        """Show an event."""
        match event:
            case SweepStarted(num_trials, finished):
                self._over = set(finished)
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
        elif event.ended is None:
            self._running[key] = event.step or 0
        else:
            self._running.pop(key, None)
            if event.outcome != "died":
                self._over.add(key)
            if self._plain:
                reason = f": {event.error}" if event.error else ""
                seconds = event.ended - event.began
                self.print_line(f"trial {key}  {event.outcome:<9} {seconds:6.1f} s  ({len(self._over)} done){reason}")
        running = "  ".join(f"{name} step {step}" for name, step in self._running.items())
        self._progress.update(self._bar, completed=len(self._over), detail=running)


MAX_POINTS = 30
"""Points in the table."""


def sweep_table(sweep: Sweep) -> Table:
    """Build the table of the best points: the swept values, the objectives, accuracies and costs."""
    space, num_hidden = sweep.space, len(sweep.points) - MAX_POINTS
    goals = ", ".join(f"{objective.mode} {objective.metric}" for objective in space.objectives)
    caption = f"and {num_hidden} more in sweep.json" if num_hidden > 0 else None
    table = Table(title=f"{space.name}: {goals}; accuracies in %", caption=caption)
    keys, metrics = list(space.parameters), shown_metrics(space)
    for name in ("", *(short_key(key) for key in keys), *metrics, "seeds"):
        table.add_column(name.replace("_", " "), justify="right")
    for point in sweep.points[:MAX_POINTS]:
        mark = "*" if point.chosen else "" if point.complete else "/".join(sorted(set(point.states)))
        mark += " !" if point.checks else ""
        values = [value_text(point.values[key]) for key in keys]
        cells = [value_cell(name, point.metrics.get(name)) for name in metrics]
        table.add_row(escape(mark), *map(escape, values), *cells, str(len(point.seeds)))
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

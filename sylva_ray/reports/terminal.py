"""Terminal output: progress of runs and evaluations, and the tables at their end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sylva_ray.core.credentials import mask_value
from sylva_ray.core.evaluation import AttackRow, ConditionRow, Evaluation
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Spread, StageAccuracies, Summary
from sylva_ray.core.text import Show
from sylva_ray.federation.observer import Notice, Observer, StageStarted, TaskDone
from sylva_ray.federation.stages.kinds import title_of
from sylva_ray.reports.phases import phase_ends

MIN_WIDTH = 100
"""Smallest width of printed tables, in characters: on a narrower terminal, and in a file, they are this wide."""


def wide_console(show: Show = "progress") -> Console:
    """Return a console on standard output, or in a notebook's cell, that is at least `MIN_WIDTH` wide.

    Args:
        show: with ``nothing``, the console prints nothing.
    """
    console = Console(quiet=show == "nothing")
    console.width = max(console.width, MIN_WIDTH)
    return console


def print_lines(console: Console, lines: Iterable[object], style: str = "") -> None:
    """Print each line unchanged, without markup, highlighting or wrapping."""
    for line in lines:
        console.print(str(line), style=style, highlight=False, markup=False, soft_wrap=True)


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
        first_columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*first_columns, *columns, console=console, disable=not self._live)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def print_line(self, line: str) -> None:
        """Print a line above the bars."""
        print_lines(self.console, [line])


class RunDisplay(Display, Observer):
    """Shows the progress of a run: one bar over its stages, or one line per stage where there is no terminal.

    Args:
        console: where to print.
        quiet: whether to show notices only.
    """

    def __init__(self, console: Console, quiet: bool) -> None:
        detail, eta = TextColumn("{task.fields[detail]}"), TextColumn("eta")
        super().__init__(console, quiet, detail, TimeElapsedColumn(), eta, TimeRemainingColumn())
        self._bar = self._progress.add_task("starting", total=None, detail="")
        self._clients_done = 0
        self._last_numbers = ""

    def on_stage(self, started: StageStarted) -> None:
        """See `Observer.on_stage`."""
        self._clients_done = 0
        self._progress.update(self._bar, total=started.num_steps, completed=started.step, description=started.title)
        self._show_detail()

    def on_task(self, done: TaskDone) -> None:
        """See `Observer.on_task`."""
        self._clients_done += done.num_clients
        self._show_detail(f"{done.work}: {self._clients_done} clients")

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        self._last_numbers = _numbers(record)
        self._clients_done = 0
        self._progress.advance(self._bar)
        self._show_detail()
        if self._plain:
            wall = record.seconds["wall"]
            self.print_line(f"step {record.step:>3}  {title_of(record.stage):<22} {self._last_numbers}  {wall:.1f} s")

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self.print_line(notice.text)

    def _show_detail(self, text: str = "") -> None:
        self._progress.update(self._bar, detail=" ".join(part for part in (text, self._last_numbers) if part))


def _numbers(record: StageRecord) -> str:
    """Return mean loss and mean accuracies of a record as text."""
    parts = []
    losses = record.metrics.get("loss", {}).values()
    if losses:
        parts.append(f"loss {sum(losses) / len(losses):.3f}")
    for condition, accuracies in (record.evaluation or {}).items():
        parts.append(f"{condition} {sum(accuracies.accuracy) / len(accuracies.accuracy):.1%}")
    return "  ".join(parts)


def closing_table(summary: Summary, records: Sequence[StageRecord]) -> Table:
    """Tabulate each client's training images, and its benign and robust accuracy before the run and after each phase.

    The last rows hold the mean and the worst decile of the clients. Robust accuracy is that under the first attack.

    Args:
        summary: of the run.
        records: of its stages.
    """
    attack = next(iter(summary.final.robust_accuracy), None)
    game, ends = summary.layer_game, phase_ends(summary, records)
    stages = [end.accuracies for end in ends]
    headings = " > ".join(end.heading for end in ends)
    table = Table(title=f"{summary.algorithm} on {summary.dataset}: accuracy in %, {headings}")
    for name in ("client", "images", "majority", "benign", f"robust ({attack})"):
        table.add_column(name, justify="right", no_wrap=True)
    if game:
        table.add_column("refined")
    for client in summary.clients:
        mark = " collapsed" if client.collapsed else ""
        cells = [f"{client.client}{mark}", str(client.train), f"{100 * client.majority_share:.1f}"]
        cells += _accuracy_cells(stages, attack, partial(_value_of_client, client=client.client))
        table.add_row(*cells, *([game.refined(client.client)] if game else []))
    table.add_section()
    for name, statistic in (("mean", "mean"), ("worst decile", "worst_decile")):
        read: Callable[[Spread], float] = attrgetter(statistic)
        cells = [name, "", f"{100 * read(summary.majority):.1f}", *_accuracy_cells(stages, attack, read)]
        table.add_row(*cells, *([""] if game else []))
    return table


def _value_of_client(spread: Spread, client: int) -> float:
    return spread.per_client[client]


def _accuracy_cells(
    stages: Sequence[StageAccuracies], attack: str | None, read: Callable[[Spread], float]
) -> list[str]:
    """Return cells of benign and of robust accuracies, with a number per stage, which ``read`` takes of a spread."""
    benign = [read(stage.benign_accuracy) for stage in stages]
    robust = [read(stage.robust_accuracy[attack]) for stage in stages] if attack else []
    return [" > ".join(f"{100 * value:5.1f}" for value in values) for values in (benign, robust)]


def closing_lines(summary: Summary, run_dir: Path | str, tracking_uri: str | None) -> list[str]:
    """Return the lines that follow the closing table: upload, seconds, checks, warnings, and where the files are.

    Args:
        summary: summary of the run.
        run_dir: path or URL of the run folder.
        tracking_uri: address of the MLflow store; None if the run is not tracked.
    """
    communication = summary.communication
    ratio = communication.full_model_ratio
    upload = f"{communication.upload_bytes_per_client_round / 1e3:,.0f} kB per client and round"
    lines = [
        f"upload   {upload}" + (f", {ratio:.0f}x less than the full model" if ratio else " (nothing is shared)"),
        f"seconds  {summary.seconds.total:.0f} in total",
    ]
    lines += [
        f"check    {check.name} {'pass' if check.passed else 'FAIL'}: {check.meaning}" for check in summary.checks
    ]
    lines += [f"warning  {text}" for text in summary.other_warnings()]
    lines += [f"report   {run_dir}/report.html", f"run      {run_dir}"]
    if tracking_uri is not None:
        lines.append(f"mlflow   mlflow ui --backend-store-uri {mask_value(tracking_uri)}")
    return lines


class EvaluationDisplay(Display, Observer):
    """Shows the progress of `sylva-ray evaluate`, one bar per measurement.

    Args:
        console: where to print.
        quiet: whether to show notices only.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        super().__init__(console, quiet, TimeElapsedColumn())
        self._bars: dict[str, TaskID] = {}

    def on_measurement(self, name: str, num_tasks: int, num_known: int) -> None:
        """See `sylva_ray.evaluation.measurements.Progress.on_measurement`."""
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=0)
        bar = self._progress.tasks[self._bars[name]]
        total = (bar.total or 0) + num_tasks
        self._progress.update(self._bars[name], total=total, completed=bar.completed + num_known)
        if self._plain:
            finished = f" ({num_known} already on disk)" if num_known else ""
            self.print_line(f"{name}: {num_tasks} tasks{finished}")

    def on_task_measured(self, name: str) -> None:
        """See `sylva_ray.evaluation.measurements.Progress.on_task_measured`."""
        self._progress.advance(self._bars[name])

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self.print_line(notice.text)


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """Tabulate the accuracies of an evaluation and, if they were computed, its checks."""
    tables = [_attacks_table(evaluation)]
    if evaluation.checks is not None:
        checks = Table(title="checks (docs/checks.md)")
        for heading in ("check", "", "meaning"):
            checks.add_column(heading)
        for check in evaluation.checks:
            verdict = "pass" if check.passed else "[bold red]FAIL[/]"
            checks.add_row(check.name, verdict, escape(check.meaning))
        tables.append(checks)
    return tables


def _attacks_table(evaluation: Evaluation) -> Table:
    table = Table(title=f"{evaluation.run}: {evaluation.images:,} images; accuracy in %")
    for name in ("attack", "mean", "95 % interval", "worst decile", "balanced", "images/s"):
        table.add_column(name, justify="left" if name == "attack" else "right", no_wrap=True)
    rows: dict[str, ConditionRow] = {"benign": evaluation.benign, **evaluation.attacks}
    rows |= {f"worst case, {name}": row for name, row in evaluation.worst_case.items()}
    for name, row in rows.items():
        low, high = row.interval
        speed = row.images_per_second if isinstance(row, AttackRow) else None
        table.add_row(
            name,
            f"{100 * row.accuracy.mean:.1f}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * row.accuracy.worst_decile:.1f}",
            f"{100 * row.balanced_accuracy.mean:.1f}",
            f"{speed:.0f}" if speed else "",
        )
    majority = evaluation.majority
    name = "always the majority class"
    table.add_row(name, f"{100 * majority.mean:.1f}", "", f"{100 * majority.worst_decile:.1f}", "", "")
    return table


def event_line(event: Mapping[str, object]) -> str:
    """Format an event as one line of keys and values; floats have four significant digits."""
    parts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in event.items())
    return "  ".join(parts)

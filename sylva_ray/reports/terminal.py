"""What the terminal shows: a live line while a run goes on, plain lines where there is no terminal, the closing table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

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

from sylva_ray.core.evaluation import AttackRow, ConditionRow, Evaluation
from sylva_ray.core.records import GameRecord, StageRecord
from sylva_ray.core.summary import Spread, StageAccuracies, Summary
from sylva_ray.federation.observer import Notice, Observer, StageStarted, TaskDone
from sylva_ray.federation.stages.kinds import title_of

MIN_WIDTH = 100
"""Columns that our tables need; a pipe or a log has no width of its own."""

Show = Literal["progress", "result", "nothing"]
"""What is printed on standard output: progress and closing tables, the tables only, or nothing."""


def wide_console(show: Show = "progress") -> Console:
    """A console on standard output (or in a notebook's cell) with room for our tables."""
    console = Console(quiet=show == "nothing")
    console.width = max(console.width, MIN_WIDTH)
    return console


def print_lines(console: Console, lines: Iterable[object], style: str = "") -> None:
    """Print each line as it is: no markup, no highlighting, no line breaks of ours."""
    for line in lines:
        console.print(str(line), style=style, highlight=False, markup=False, soft_wrap=True)


class Display:
    """Bars while something goes on, shown on a terminal only; use as a context manager.

    Args:
        quiet: no bars there either, and no line that only tells of progress.
        columns: what a bar shows besides its name, its length and the time since it began.
    """

    def __init__(self, console: Console, quiet: bool, *columns: ProgressColumn) -> None:
        self.console = console
        self._live = console.is_terminal and not quiet
        self._plain = not self._live and not quiet
        usual = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*usual, *columns, console=console, disable=not self._live)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def print_line(self, line: str) -> None:
        print_lines(self.console, [line])


class RunDisplay(Display, Observer):
    """Shows a run while it goes on."""

    def __init__(self, console: Console, quiet: bool) -> None:
        detail, eta = TextColumn("{task.fields[detail]}"), TextColumn("eta")
        super().__init__(console, quiet, detail, TimeElapsedColumn(), eta, TimeRemainingColumn())
        self._bar = self._progress.add_task("starting", total=None, detail="")
        self._clients_done = 0
        self._numbers = ""

    def on_stage(self, started: StageStarted) -> None:
        """See `Observer.on_stage`."""
        self._clients_done = 0
        self._progress.update(self._bar, total=started.num_steps, completed=started.step, description=started.title)
        self._detail()

    def on_task(self, done: TaskDone) -> None:
        """See `Observer.on_task`."""
        self._clients_done += done.num_clients
        self._detail(f"{done.work}: {self._clients_done} clients")

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        self._numbers = _numbers(record)
        self._clients_done = 0
        self._progress.advance(self._bar)
        self._detail()
        if self._plain:
            wall = record.seconds["wall"]
            self.print_line(f"step {record.step:>3}  {title_of(record.stage):<22} {self._numbers}  {wall:.1f} s")

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self.print_line(notice.text)

    def _detail(self, text: str = "") -> None:
        self._progress.update(self._bar, detail=" ".join(part for part in (text, self._numbers) if part))


def _numbers(record: StageRecord) -> str:
    parts = []
    losses = record.metrics.get("loss", {}).values()
    if losses:
        parts.append(f"loss {sum(losses) / len(losses):.3f}")
    for condition, found in (record.evaluation or {}).items():
        parts.append(f"{condition} {sum(found.accuracy) / len(found.accuracy):.1%}")
    return "  ".join(parts)


def closing_table(summary: Summary) -> Table:
    """Tabulate per client: training images, benign and robust accuracy before, after phase 1 and after phase 2."""
    attack = next(iter(summary.final.robust_accuracy), None)
    game = summary.layer_game
    ends = [summary.initial, summary.phase1, *([summary.final] if game else [])]
    stages = [stage for stage in ends if stage is not None]
    way = " > ".join(["before", "phase 1", "phase 2"][: len(stages)])
    table = Table(title=f"{summary.algorithm} on {summary.dataset}: accuracy in %, {way}")
    for name in ("client", "images", "majority", "benign", f"robust ({attack})"):
        table.add_column(name, justify="right", no_wrap=True)
    if game:
        table.add_column("refined")
    for client in summary.clients:
        mark = " collapsed" if client.collapsed else ""
        cells = [f"{client.client}{mark}", str(client.train), f"{100 * client.majority_share:.1f}"]
        cells += _accuracies(stages, attack, lambda spread, i=client.client: spread.per_client[i])  # type: ignore[misc]
        table.add_row(*cells, *([_refined(game, client.client)] if game else []))
    table.add_section()
    statistics: dict[str, Callable[[Spread], float]] = {
        "mean": lambda spread: spread.mean,
        "worst decile": lambda spread: spread.worst_decile,
    }
    for name, pick in statistics.items():
        cells = [name, "", f"{100 * pick(summary.majority):.1f}", *_accuracies(stages, attack, pick)]
        table.add_row(*cells, *([""] if game else []))
    return table


def _accuracies(stages: Sequence[StageAccuracies], attack: str | None, pick: Callable[[Spread], float]) -> list[str]:
    """Write benign and robust accuracy after each stage; ``pick`` takes one number out of a spread."""
    benign = [pick(stage.benign_accuracy) for stage in stages]
    robust = [pick(stage.robust_accuracy[attack]) for stage in stages] if attack else []
    return [" > ".join(f"{100 * value:5.1f}" for value in values) for values in (benign, robust)]


def _refined(game: GameRecord, client: int) -> str:
    chosen = game.selected_layers(client)
    if not chosen:
        return "none"
    if not game.refined_epochs[client]:
        return f"{' '.join(chosen)} (no epoch passed)"
    return " ".join(chosen)


def closing_lines(summary: Summary, run_dir: Path | str, tracking_uri: str | None) -> list[str]:
    """Write what follows the closing table: bytes, seconds, warnings, and where things are.

    Args:
        summary: of the run.
        run_dir: a path, or the URL of a run folder elsewhere.
        tracking_uri: MLflow's store; None where nothing is tracked.
    """
    communication = summary.communication
    ratio = communication.full_model_ratio
    upload = f"{communication.upload_bytes_per_client_round / 1e3:,.0f} kB per client and round"
    lines = [
        f"upload   {upload}" + (f", {ratio:.0f}x less than the full model" if ratio else " (nothing is shared)"),
        f"seconds  {summary.seconds.total:.0f} in all",
    ]
    lines += [
        f"check    {check.name} {'pass' if check.passed else 'FAIL'}: {check.meaning}" for check in summary.checks
    ]
    lines += [f"warning  {text}" for text in summary.other_warnings()]
    lines += [f"report   {run_dir}/report.html", f"run      {run_dir}"]
    if tracking_uri is not None:
        lines.append(f"mlflow   mlflow ui --backend-store-uri {tracking_uri}")
    return lines


class EvaluationDisplay(Display, Observer):
    """Shows the measurements of `sylva-ray evaluate`, one bar each."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        super().__init__(console, quiet, TimeElapsedColumn())
        self._bars: dict[str, TaskID] = {}

    def on_measurement(self, name: str, num_tasks: int, num_known: int) -> None:
        """See `sylva_ray.evaluation.run.Progress.on_measurement`."""
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=0)
        bar = self._progress.tasks[self._bars[name]]
        total = (bar.total or 0) + num_tasks
        self._progress.update(self._bars[name], total=total, completed=bar.completed + num_known)
        if self._plain:
            before = f" ({num_known} from before)" if num_known else ""
            self.print_line(f"{name}: {num_tasks} tasks{before}")

    def on_task_measured(self, name: str) -> None:
        """See `sylva_ray.evaluation.run.Progress.on_task_measured`."""
        self._progress.advance(self._bars[name])

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self.print_line(notice.text)


def evaluation_tables(found: Evaluation) -> list[Table]:
    """Tabulate the attacks, and the checks if they ran."""
    table = Table(title=f"{found.run}: {found.images:,} images; accuracy in %")
    for name in ("attack", "mean", "95 % interval", "worst decile", "balanced", "images/s"):
        table.add_column(name, justify="left" if name == "attack" else "right", no_wrap=True)
    rows: dict[str, ConditionRow] = {"benign": found.benign, **found.attacks}
    rows |= {f"worst case, {name}": row for name, row in found.worst_case.items()}
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
    majority = found.majority
    name = "always the majority class"
    table.add_row(name, f"{100 * majority.mean:.1f}", "", f"{100 * majority.worst_decile:.1f}", "", "")
    tables = [table]
    if found.checks is not None:
        checks = Table(title="checks (docs/checks.md)")
        for heading in ("check", "", "meaning"):
            checks.add_column(heading)
        for check in found.checks:
            verdict = "pass" if check.passed else "[bold red]FAIL[/]"
            checks.add_row(check.name, verdict, escape(check.meaning))
        tables.append(checks)
    return tables


def event_line(event: Mapping[str, Any]) -> str:
    """Write an event on one line: its keys and values, numbers with four digits."""
    parts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in event.items())
    return "  ".join(parts)

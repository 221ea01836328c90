"""What the terminal shows: a live line while a run goes on, plain lines where there is no terminal, the closing table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

    def say(self, line: str) -> None:
        print_lines(self.console, [line])


class RunDisplay(Display):
    """Shows a run's events (see `sylva_ray.federation.loop.Rounds`)."""

    def __init__(self, console: Console, quiet: bool) -> None:
        detail, eta = TextColumn("{task.fields[detail]}"), TextColumn("eta")
        super().__init__(console, quiet, detail, TimeElapsedColumn(), eta, TimeRemainingColumn())
        self._bar = self._progress.add_task("starting", total=None, detail="")
        self._clients_done = 0
        self._numbers = ""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """One event of the run."""
        match event["event"]:
            case "step":
                self._clients_done = 0
                name = title_of(event["stage"])
                self._progress.update(self._bar, total=event["steps"], completed=event["step"], description=name)
                self._detail()
            case "task":
                self._clients_done += len(event["clients"])
                self._detail(f"{event['stage']}: {self._clients_done} clients")
            case "record":
                record = event["record"]
                self._numbers = _numbers(record)
                self._clients_done = 0
                self._progress.advance(self._bar)
                self._detail()
                if self._plain:
                    wall = record["seconds"]["wall"]
                    self.say(f"step {record['step']:>3}  {title_of(record['stage']):<22} {self._numbers}  {wall:.1f} s")
            case "missing":
                who = ", ".join(map(str, event["clients"]))
                self.say(f"round {event['round']}: clients {who} missed the deadline")
            case "worker_lost":
                self.say(f"a worker died during {event['where']}; its clients run again elsewhere")
            case "unsaved":
                self.say(f"{event['reason']}; the run goes on and tries again after the next step")
            case "waiting":
                self.say(event["what"])
            case "coordinator_restarted":
                self.say("the coordinator died and was restarted; it goes on from the newest checkpoint")
            case "finishing":
                self._detail("writing the report")

    def _detail(self, text: str = "") -> None:
        self._progress.update(self._bar, detail=" ".join(part for part in (text, self._numbers) if part))


def _numbers(record: Mapping[str, Any]) -> str:
    parts = []
    losses = record["metrics"].get("loss", {}).values()
    if losses:
        parts.append(f"loss {sum(losses) / len(losses):.3f}")
    if record["evaluation"]:
        for condition, metrics in record["evaluation"].items():
            values = metrics["accuracy"]
            parts.append(f"{condition} {sum(values) / len(values):.1%}")
    return "  ".join(parts)


def closing_table(summary: Mapping[str, Any]) -> Table:
    """Per client: training images, benign and robust accuracy before, after phase 1 and after phase 2."""
    attack = next(iter(summary["final"]["robust_accuracy"]), None)
    has_phase2 = summary["layer_game"] is not None
    stages = [summary["initial"], summary["phase1"], *([summary["final"]] if has_phase2 else [])]
    way = " > ".join(["before", "phase 1", "phase 2"][: len(stages)])
    table = Table(title=f"{summary['algorithm']} on {summary['dataset']}: accuracy in %, {way}")
    for name in ("client", "images", "majority", "benign", f"robust ({attack})"):
        table.add_column(name, justify="right", no_wrap=True)
    if has_phase2:
        table.add_column("refined")

    def accuracies(pick: Callable[[Mapping[str, Any]], float]) -> list[str]:
        """``pick`` takes one number out of a spread."""
        benign = [pick(stage["benign_accuracy"]) for stage in stages]
        robust = [pick(stage["robust_accuracy"][attack]) for stage in stages] if attack else []
        return [" > ".join(f"{100 * value:5.1f}" for value in values) for values in (benign, robust)]

    for client in summary["clients"]:
        i = client["client"]
        mark = " collapsed" if client["collapsed"] else ""
        cells = [f"{i}{mark}", str(client["train"]), f"{100 * client['majority_share']:.1f}"]
        cells += accuracies(lambda spread, i=i: float(spread["per_client"][i]))  # type: ignore[misc]
        table.add_row(*cells, *([_refined(summary["layer_game"], i)] if has_phase2 else []))
    table.add_section()
    for name, key in (("mean", "mean"), ("worst decile", "worst_decile")):
        majority = f"{100 * summary['majority'][key]:.1f}"
        row = accuracies(lambda spread, key=key: float(spread[key]))  # type: ignore[misc]
        table.add_row(name, "", majority, *row, *([""] if has_phase2 else []))
    return table


def _refined(game: Mapping[str, Any], client: int) -> str:
    chosen = [p.removeprefix("blocks.") for p, on in zip(game["players"], game["selected"][client], strict=True) if on]
    if not chosen:
        return "none"
    if not game["refined_epochs"][client]:
        return f"{' '.join(chosen)} (no epoch passed)"
    return " ".join(chosen)


def closing_lines(summary: Mapping[str, Any], run_dir: Path | str, tracking_uri: str | None) -> list[str]:
    """Bytes, seconds, warnings, and where things are (``run_dir``: a path, or the URL of a run folder elsewhere)."""
    communication, seconds = summary["communication"], summary["seconds"]
    ratio = communication["full_model_ratio"]
    upload = f"{communication['upload_bytes_per_client_round'] / 1e3:,.0f} kB per client and round"
    lines = [
        f"upload   {upload}" + (f", {ratio:.0f}x less than the full model" if ratio else " (nothing is shared)"),
        f"seconds  {seconds['total']:.0f} in all",
    ]
    lines += [
        f"check    {check['name']} {'pass' if check['passed'] else 'FAIL'}: {check['meaning']}"
        for check in summary["checks"]
    ]
    checked = {f"check {check['name']}" for check in summary["checks"]}
    lines += [f"warning  {text}" for text in summary["warnings"] if not any(text.startswith(name) for name in checked)]
    lines += [f"report   {run_dir}/report.html", f"run      {run_dir}"]
    if tracking_uri is not None:
        lines.append(f"mlflow   mlflow ui --backend-store-uri {tracking_uri}")
    return lines


class AssessmentDisplay(Display):
    """Shows the measurements of `sylva-ray evaluate`, one bar each."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        super().__init__(console, quiet, TimeElapsedColumn())
        self._bars: dict[str, TaskID] = {}

    def on_event(self, event: Mapping[str, Any]) -> None:
        """``measure``: tasks of a kind begin, some known from before; ``measured``: one of them is done."""
        name = event["name"]
        if event["event"] == "measure":
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=0)
            bar = self._progress.tasks[self._bars[name]]
            total = (bar.total or 0) + event["tasks"]
            self._progress.update(self._bars[name], total=total, completed=bar.completed + event["known"])
            if self._plain:
                before = f" ({event['known']} from before)" if event["known"] else ""
                self.say(f"{name}: {event['tasks']} tasks{before}")
        else:
            self._progress.advance(self._bars[name])

    def on_lost(self, where: str) -> None:
        """A worker died; its task runs again elsewhere."""
        self.say(f"a worker died during {where}; its task runs again elsewhere")

    def on_waiting(self, what: str) -> None:
        """No worker is there yet."""
        self.say(what)


def assessment_tables(found: Mapping[str, Any]) -> list[Table]:
    """Attacks, and the checks if they ran."""
    table = Table(title=f"{found['run']}: {found['images']:,} images; accuracy in %")
    for name in ("attack", "mean", "95 % interval", "worst decile", "balanced", "images/s"):
        table.add_column(name, justify="left" if name == "attack" else "right", no_wrap=True)
    rows = {"benign": found["benign"], **found["attacks"]}
    rows |= {f"worst case, {name}": row for name, row in found["worst_case"].items()}
    for name, row in rows.items():
        low, high = row["interval"]
        speed = row.get("images_per_second")
        table.add_row(
            name,
            f"{100 * row['accuracy']['mean']:.1f}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * row['accuracy']['worst_decile']:.1f}",
            f"{100 * row['balanced_accuracy']['mean']:.1f}",
            f"{speed:.0f}" if speed else "",
        )
    majority = found["majority"]
    table.add_row(
        "always the majority class",
        f"{100 * majority['mean']:.1f}",
        "",
        f"{100 * majority['worst_decile']:.1f}",
        "",
        "",
    )
    tables = [table]
    if "checks" in found:
        checks = Table(title="checks (docs/checks.md)")
        for name in ("check", "", "meaning"):
            checks.add_column(name)
        for check in found["checks"]:
            verdict = "pass" if check["passed"] else "[bold red]FAIL[/]"
            checks.add_row(check["name"], verdict, escape(check["meaning"]))
        tables.append(checks)
    return tables


def event_line(event: Mapping[str, Any]) -> str:
    """Write an event on one line: its keys and values, numbers with four digits."""
    parts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in event.items())
    return "  ".join(parts)

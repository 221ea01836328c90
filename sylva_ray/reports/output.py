"""What runs, evaluations and pre-trainings print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sylva_ray.core.text import PROGRESS, LogFormat, Show

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from sylva_ray.core.evaluation import Evaluation
    from sylva_ray.core.summary import Summary
    from sylva_ray.federation.observer import Observer
    from sylva_ray.reports.evaluation_log import EvaluationLog
    from sylva_ray.reports.progress import EvaluationDisplay
    from sylva_ray.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Output:
    """What a run, an evaluation or a pre-training prints.

    Attributes:
        show: progress (with every task or not) and result, the result only, or nothing.
        log_format: lines with time stamps in place of the bars, as sentences or JSON; None: bars.
    """

    show: Show
    log_format: LogFormat | None = None

    @property
    def has_progress(self) -> bool:
        """Whether progress is shown."""
        return self.show in PROGRESS

    @property
    def has_bars(self) -> bool:
        """Whether progress is shown by bars, or by lines without time stamps where there is no terminal."""
        return self.has_progress and self.log_format is None

    def console(self) -> Console:
        """Return the console for everything that is no JSON."""
        from sylva_ray.reports.console import create_console

        return create_console("nothing" if self.log_format == "json" else self.show)

    @contextmanager
    def observing(self, console: Console, folder: RunFolder) -> Iterator[list[Observer]]:
        """Yield what shows a run on the terminal, and what writes its ``run.log``."""
        from sylva_ray.reports.progress import RunDisplay
        from sylva_ray.reports.run_log import RunLog, RunLogFile

        if self.log_format is not None and self.has_progress:
            yield [RunLog(partial(print, flush=True), self.log_format, self.show == "tasks"), RunLogFile(folder)]
            return
        with RunDisplay(console, not self.has_progress, self.show == "tasks") as display:
            yield [display, RunLogFile(folder)]

    @contextmanager
    def observing_evaluation(self, console: Console) -> Iterator[EvaluationDisplay | EvaluationLog]:
        """Yield what shows an evaluation on the terminal."""
        from sylva_ray.reports.evaluation_log import EvaluationLog
        from sylva_ray.reports.progress import EvaluationDisplay

        verbose = self.show == "tasks"
        if self.log_format is not None and self.has_progress:
            yield EvaluationLog(partial(print, flush=True), self.log_format, verbose)
            return
        with EvaluationDisplay(console, not self.has_progress, verbose) as display:
            yield display

    def print_evaluation(self, console: Console, evaluation: Evaluation, path: Path) -> None:
        """Print the tables and lines at the end of an evaluation, or the JSON object that stands for them.

        Args:
            console: from `console`.
            evaluation: what was measured.
            path: of the file that holds it.
        """
        from sylva_ray.reports.console import print_lines, wrapped
        from sylva_ray.reports.evaluation_log import EvaluationLog
        from sylva_ray.reports.terminal import LINE_INDENT, evaluation_lines, evaluation_tables

        if self.log_format == "json" and self.show != "nothing":
            EvaluationLog(print, "json").tell_result(evaluation, str(path))
            return
        for table in evaluation_tables(console, evaluation):
            console.print(table)
        lines = [*evaluation_lines(evaluation), *(f"warning  {text}" for text in evaluation.warnings or ())]
        print_lines(console, wrapped(console, lines, LINE_INDENT))
        print_lines(console, [path])

    def print_result(
        self, console: Console, summary: Summary, folder: RunFolder, where: str, tracking_uri: str | None
    ) -> None:
        """Print the closing table and lines, or the JSON object that stands for them.

        Args:
            console: from `console`.
            summary: of the run.
            folder: of the run.
            where: path or URL of the folder, as it is printed.
            tracking_uri: address of the MLflow store; None if the run is not tracked.
        """
        from sylva_ray.reports.console import print_lines, wrapped
        from sylva_ray.reports.run_log import RunLog
        from sylva_ray.reports.terminal import LINE_INDENT, closing_lines, closing_table

        if self.show == "nothing":
            return
        if self.log_format == "json":
            RunLog(print, "json").tell_result(summary, where)
            return
        console.print(closing_table(console, summary, folder.load_records()))
        print_lines(console, wrapped(console, closing_lines(summary, where, tracking_uri), LINE_INDENT))

"""What a run prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sylva_ray.core.text import PROGRESS, LogFormat, Show

if TYPE_CHECKING:
    from rich.console import Console

    from sylva_ray.core.summary import Summary
    from sylva_ray.federation.observer import Observer
    from sylva_ray.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Output:
    """What a run prints.

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

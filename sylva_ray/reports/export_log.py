"""The progress of ``sylva-ray export`` as lines, one per client."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sylva_ray.core.text import PROGRESS, LogFormat, Show, duration
from sylva_ray.reports.event_lines import EventLines


class ExportLog:
    """Writes a line for every client whose files are complete.

    Args:
        write: takes a line without its end.
        num_clients: that are exported.
        show: ``result``: the lines are the clients' folders alone.
        form: of the lines, see `EventLines`; None: sentences without time stamps. The only event is ``client``.
    """

    def __init__(
        self, write: Callable[[str], None], num_clients: int, show: Show = "progress", form: LogFormat | None = None
    ) -> None:
        self._write, self._show = write, show
        self._lines = EventLines(write, form) if form and show in PROGRESS else None
        self._num_clients, self._done, self._started = num_clients, 0, time.perf_counter()

    def on_client(self, folder: Path) -> None:
        """Write that a client's folder is complete."""
        self._done += 1
        seconds = time.perf_counter() - self._started
        left = seconds / self._done * (self._num_clients - self._done)
        count = f"{self._done:>{len(str(self._num_clients))}}/{self._num_clients}"
        sentence = f"{count}  {folder}  {seconds:.1f} s" + (f"  eta {duration(left)}" if left else "")
        if self._lines is not None:
            place = {"folder": str(folder), "done": self._done, "total": self._num_clients}
            self._lines.tell("client", sentence, **place, seconds=round(seconds, 1), seconds_left=round(left, 1))
        elif self._show != "nothing":
            self._write(sentence if self._show in PROGRESS else str(folder))

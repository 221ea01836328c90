"""Observers that keep a run's files: ``rounds.jsonl``, and the copy of the run folder at a URL."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sylva_ray.core.errors import RunError
from sylva_ray.core.records import StageRecord
from sylva_ray.federation.observer import Notice, Observer
from sylva_ray.storage.remote_copy import RemoteFolder
from sylva_ray.storage.run_folder import RunFolder


class RecordsFile(Observer):
    """Writes ``rounds.jsonl``, a line per stage."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.records: list[StageRecord] = []

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """Write the file again: it may be ahead of the checkpoint that the run continues from, or behind it."""
        self.records = list(records)
        self.folder.write_records(self.records)

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        self.records.append(record)
        self.folder.write_records(self.records)


class RemoteCopy(Observer):
    """Sends the run folder to a URL after every stage. A failure is a notice: the next stage sends what is missing.

    Args:
        remote: the URL and its local folder.
        notify: receives the notice.
    """

    def __init__(self, remote: RemoteFolder, notify: Callable[[Notice], None]) -> None:
        self.remote, self.notify = remote, notify

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """See `Observer.on_resume`."""
        del records
        self._push()

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        del record
        self._push()

    def _push(self) -> None:
        try:
            self.remote.push()
        except RunError as error:
            self.notify(Notice(f"{error}; the run goes on and tries again after the next stage"))

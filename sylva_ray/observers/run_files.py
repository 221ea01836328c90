"""Observers that write the files of a run: ``rounds.jsonl``, and a copy of the run folder at a URL."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sylva_ray.core.errors import RunError
from sylva_ray.core.records import StageRecord
from sylva_ray.federation.observer import Notice, Observer
from sylva_ray.storage.remote_copy import RemoteFolder
from sylva_ray.storage.run_folder import RunFolder


class RecordsFile(Observer):
    """Writes ``rounds.jsonl``, one line per stage.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """Rewrite the file, which may hold more or fewer records than the checkpoint that the run continues from."""
        self.folder.write_records(records)

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        self.folder.append_record(record)


class RemoteCopy(Observer):
    """Copies the run folder to a URL after every stage.

    A failed copy is reported as a notice and does not stop the run; the next copy includes whatever is missing.

    Args:
        remote: the URL and the local folder that is copied to it.
        notify: receives the notice of a failure.
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
            self.notify(Notice(f"{error}; the run continues and the copy is retried after the next stage"))

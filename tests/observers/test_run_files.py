"""``rounds.jsonl`` as its observer writes it: a line per stage, and after a resume what the checkpoint knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from sylva_ray.observers.run_files import RecordsFile
from sylva_ray.storage.run_folder import RunFolder
from tests.federation.runs import bare_record


@pytest.mark.parametrize("on_disk", [0, 1, 2, 4], ids=lambda lines: f"{lines} lines on disk")
def test_a_resume_continues_behind_the_checkpoint(on_disk: int, tmp_path: Path) -> None:
    """Stopped between a checkpoint and its record, or the newest checkpoint was damaged: two stages count."""
    folder = RunFolder(tmp_path)
    folder.write_records([bare_record(step) for step in range(on_disk)])
    observer = RecordsFile(folder)
    observer.on_resume([bare_record(0), bare_record(1)])
    observer.on_record(bare_record(2))
    assert folder.load_records() == [bare_record(step) for step in range(3)]


def test_a_record_of_another_version_is_written_as_it_was_read(tmp_path: Path) -> None:
    """Keys that it lacks stay absent, keys that are not known stay there."""
    folder = RunFolder(tmp_path)
    line = '{"step": 0, "stage": "warmup", "round": 0, "participants": [0], "evaluation": null, "later": {"a": 1}}\n'
    folder.records_file.write_text(line)
    RecordsFile(folder).on_resume(folder.load_records())
    assert folder.records_file.read_text() == line

"""rounds.jsonl survives torn writes and is replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sylva_ray.core.errors import UserError
from sylva_ray.storage.jsonl import append_record, read_records, rewrite_records


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    records: list[dict[str, object]] = [{"step": 0, "text": "two\nlines, ü"}, {"step": 1, "nothing": None}]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records


def test_no_file_means_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "rounds.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 1, "lo', b'{"step": 1}', b"\x00\x00"])
def test_a_torn_last_line_is_ignored_and_cut_by_the_next_append(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rounds.jsonl"
    append_record(path, {"step": 0})
    with open(path, "ab") as file:
        file.write(torn)
    assert read_records(path) == [{"step": 0}]
    append_record(path, {"step": 1, "again": True})
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1, "again": true}\n'


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"step": 0}\n{"step\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_records(path)


def test_rewriting_cuts_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    rewrite_records(path, [{"step": step} for step in range(5)])
    rewrite_records(path, [{"step": 0}])
    assert read_records(path) == [{"step": 0}]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rewrite_leaves_the_old_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rounds.jsonl"
    rewrite_records(path, [{"step": 0}])

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        rewrite_records(path, [{"step": 0}, {"step": 1}])
    assert read_records(path) == [{"step": 0}]

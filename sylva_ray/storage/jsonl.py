"""``rounds.jsonl``: one JSON object per completed step, in order. It is the truth about a run; everything else is a view.

A line counts once its newline is on disk. What a crash left behind the last newline is ignored by the reader and cut off
by the next append, so a torn line never costs more than itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sylva_ray.core.errors import UserError
from sylva_ray.storage.atomic import write_atomically


def append_record(path: Path, record: Mapping[str, object]) -> None:
    """Add one line and see it onto the disk before returning."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(_line(record))
        _to_disk(file)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All complete records, oldest first; none if there is no file.

    Raises:
        UserError: a complete line is not a JSON object; names the line.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    lines = content.split(b"\n")[:-1]  # behind the last newline: nothing, or a torn line
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def rewrite_records(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Replace the whole file in one step: a reader sees the old records or the new ones, never a mixture."""
    write_atomically(path, b"".join(map(_line, records)), durable=True)


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(record).encode() + b"\n"  # JSON escapes newlines, so one record is one line


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        fix = f"line {number} is not a JSON object; resume the run, which writes the file again from its checkpoint"
        raise UserError("records", str(path), fix)
    return record


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

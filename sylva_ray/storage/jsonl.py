"""Files of JSON lines, such as ``rounds.jsonl``: one object per line, oldest first.

A line counts once its newline is on the disk. An incomplete line at the end, left by a crash, is ignored by the reader
and removed by the next append.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.files import read_regular_file
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.reading import parse_json


def append_record(path: Path, record: Mapping[str, object]) -> None:
    """Append a line; it is on the disk when this returns.

    Args:
        path: the file; it need not exist.
        record: a JSON object.
    """
    with open(path, "ab+") as file:
        if size := file.tell():
            file.seek(size - 1)
            if file.read(1) != b"\n":  # a line that was cut by a kill
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all complete lines, oldest first.

    Args:
        path: the file; where it does not exist there are no lines.

    Raises:
        UserError: a complete line is not a JSON object; names the line.
    """
    try:
        content = read_regular_file(Path(path), "records")
    except FileNotFoundError:
        return []
    complete_lines = content.split(b"\n")[:-1]
    return [_parse(path, number, line) for number, line in enumerate(complete_lines, start=1)]


def rewrite_records(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Replace the whole file in one step: a reader sees the old lines or the new ones.

    Args:
        path: the file.
        records: JSON objects, oldest first.
    """
    write_atomically(path, b"".join(map(_line, records)), durable=True)


def _line(record: Mapping[str, object]) -> bytes:
    try:  # JSON escapes newlines, so a record is a single line
        return json.dumps(record, allow_nan=False).encode() + b"\n"
    except ValueError as error:
        raise RunError(f"a record cannot be written, because JSON has no such number ({error})") from error


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        fix = f"line {number} is not a JSON object; resume the run, which writes the file again from its checkpoint"
        raise UserError("records", str(path), fix)
    return record

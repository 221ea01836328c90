"""Files that are written at once or not at all: a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sylva_ray.core.errors import UserError


def write_atomically(path: Path, content: bytes | str, durable: bool = False) -> Path:
    """Write a draft beside ``path`` and rename it.

    Args:
        content: text is written as UTF-8.
        durable: whether the content is on the disk before the file has its name (it survives a loss of power).

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    draft = path.with_name(f".{path.name}")
    with open(draft, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    return draft.replace(path)


def write_json(path: Path, content: Any) -> Path:
    """`write_atomically` for a JSON value, indented by one space."""
    return write_atomically(path, json.dumps(content, indent=1) + "\n")


def check_target(key: str, path: Path | None) -> None:
    """Whether a file can be written there, before the work that it would hold.

    Raises:
        UserError: it is a folder, or its folder does not exist.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(key, str(path), "is a folder" if path.is_dir() else "its folder does not exist")

"""Write files atomically: a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sylva_ray.core.errors import UserError


def write_atomically(path: Path, content: bytes | str, durable: bool = False) -> Path:
    """Write a hidden file beside ``path`` and rename it.

    Args:
        path: the file; its folder must exist.
        content: text is written as UTF-8.
        durable: whether the content is on the disk before the file gets its name, so that it survives a loss of power.

    Returns:
        ``path``.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    draft = path.with_name(f".{path.name}")
    with open(draft, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    return draft.replace(path)


def write_json(path: Path, content: object) -> Path:
    """Write a JSON value, indented by one space, as `write_atomically` does.

    Args:
        path: the file; its folder must exist.
        content: a value that ``json.dumps`` takes.

    Returns:
        ``path``.
    """
    return write_atomically(path, json.dumps(content, indent=1) + "\n")


def check_target(key: str, path: Path | None) -> None:
    """Check that a file can be created, before the work whose result it gets.

    Args:
        key: name of the setting, for the message.
        path: the file; None is accepted.

    Raises:
        UserError: it is a folder, or its folder does not exist.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(key, str(path), "is a folder" if path.is_dir() else "its folder does not exist")

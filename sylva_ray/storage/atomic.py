"""Write files atomically: a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import json
import os
from pathlib import Path


def draft_of(path: Path) -> Path:
    """Return the hidden file beside ``path`` that becomes it."""
    return path.with_name(f".{path.name}")


def write_atomically(path: Path, content: bytes | str, durable: bool = False) -> Path:
    """Write a hidden file beside ``path`` and rename it.

    Args:
        path: the file; its folder must exist.
        content: text is written as UTF-8.
        durable: whether the file is on the disk, under its name, when this returns, so that it survives a loss of power.

    Returns:
        ``path``.

    Raises:
        OSError: it cannot be written; the old content stays, and nothing beside it.
    """
    draft = draft_of(path)
    try:
        with open(draft, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)
    return path


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk; without it, a loss of power may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: object, durable: bool = False) -> Path:
    """Write a JSON value, indented by one space, as `write_atomically` does.

    Args:
        path: the file; its folder must exist.
        content: a value that ``json.dumps`` takes.
        durable: see `write_atomically`.

    Returns:
        ``path``.
    """
    return write_atomically(path, json_text(content), durable)


def json_text(content: object) -> str:
    """Return a JSON value as text, indented by one space."""
    return json.dumps(content, indent=1) + "\n"

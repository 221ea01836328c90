"""Write files atomically: a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sylva_ray.core.credentials import has_credentials


def draft_of(path: Path) -> Path:
    """Return the hidden file beside ``path`` that becomes it."""
    return path.with_name(f".{path.name}")


def write_atomically(path: Path, content: bytes | str, durable: bool = False) -> Path:
    """Write a hidden file beside ``path`` and rename it.

    Args:
        path: the file; its folder must exist.
        content: text is written as UTF-8; one with credentials in it can be read by its owner only.
        durable: whether the file is on the disk, under its name, when this returns, so that it survives a loss of
            power.

    Returns:
        ``path``.

    Raises:
        OSError: it cannot be written; the old content stays, and nothing beside it.
    """
    is_private = isinstance(content, str) and has_credentials(content)
    with replaced(path, durable, _open_private if is_private else None) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def replaced(path: Path, durable: bool, opener: Callable[[str, int], int] | None = None) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of ``path`` when its block ends, and is deleted if it cannot be written.

    Args:
        path: see `write_atomically`.
        durable: see `write_atomically`.
        opener: see `open`.

    Raises:
        OSError: see `write_atomically`.
    """
    draft = draft_of(path)
    try:
        draft.unlink(missing_ok=True)  # one that was left may have other permissions
        with open(draft, "wb", opener=opener) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file, which is never changed in place, a second name; where the file system has no links, copy it."""
    try:
        os.link(source, target)
    except OSError:
        with open(source, "rb") as content, replaced(target, durable=True) as file:
            shutil.copyfileobj(content, file)


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

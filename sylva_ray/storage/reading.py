"""Read the files of a run, a sweep or a cache: whatever stands there, the answer is its content or one line."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from sylva_ray.core.errors import UserError


def read_file(path: Path, key: str) -> bytes:
    """Read a file.

    Args:
        path: the file.
        key: what it holds, for the message.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is a folder or a device, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(key, str(path), "is not a file")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(key, str(path), f"cannot be read ({error.strerror})") from None


def parse_json(content: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, or nested too deeply; the message is one line.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, key: str, fix: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        key: what it holds, for the message.
        fix: what to do where it is damaged.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return parse_json(read_file(path, key))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(key, str(path), f"is not JSON ({error}); {fix}") from None

"""Read JSON that may be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sylva_ray.core.errors import UserError
from sylva_ray.core.files import read_regular_file


def parse_json(content: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, contains NaN or Infinity, or is nested too deeply; the message is one line.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError:
        raise ValueError("not a text in UTF-8") from None
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")


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
        return parse_json(read_regular_file(path, key))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(key, str(path), f"is not JSON ({error}); {fix}") from None

"""Reading of text files that a user names, which may be anything."""

from __future__ import annotations

import stat
from pathlib import Path

from sylva_ray.core.errors import UserError

MAX_BYTES = 2_000_000
"""Of a text file that is read at once."""


def read_text_file(path: Path, missing: str = "no such file") -> str:
    """Read a small text file in UTF-8.

    Args:
        path: of the file.
        missing: what to say if there is none.

    Raises:
        UserError: it does not exist, is not a regular file (a folder, a pipe, a device), cannot be read, is too large,
            or is not UTF-8.
    """
    try:
        content = read_regular_file(path, "file", MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError("file", str(path), missing) from None
    if len(content) > MAX_BYTES:
        raise UserError(
            "file", str(path), f"is larger than {MAX_BYTES // 1_000_000} MB, and no text file of this kind is"
        )
    if content.startswith(b"\xef\xbb\xbf"):
        raise UserError("file", str(path), "begins with a byte order mark; save it as UTF-8 without one")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError("file", str(path), f"is not a text in UTF-8 (byte {error.start:,})") from None


def read_regular_file(path: Path, key: str, limit: int = -1) -> bytes:
    """Read a file, and nothing else that has a name.

    Args:
        path: of the file.
        key: what it holds, for the message.
        limit: bytes to read at most; negative: all.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not a regular file (a folder, a pipe, a device), or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UserError(key, str(path), f"is {what}, and a file is expected")
        with open(path, "rb") as file:
            return file.read(limit)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(path)) from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(key, str(path), f"cannot be read ({reason})") from None

"""Paths and URLs that a user gives, read in one way by every argument, option and setting.

``~`` and ``~user`` are home folders. Variables such as ``$HOME`` are not expanded, because the shell does that. A
relative path starts in the current directory, and a setting is stored with an absolute one, so that later commands find
the same file from anywhere; a path that begins with ``~/`` is stored as it is.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

from sylva_ray.core.errors import UserError

MAX_NAME = 254
"""Bytes of the name of a file: one less than most file systems take, because a draft has a dot before its name."""

MAX_PATH = 4095
"""Bytes of a path on Linux."""

Kind = Literal["file", "folder"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_VARIABLE = re.compile(r"\$(\w|\{)")
_NAMED = ("s3", "gs", "abfs", "hdfs", "http", "https", "sftp", "ftp", "memory", "file", "smb", "github")
"""Protocols that are suggested in place of an unknown one."""

_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "r2")
"""Protocols whose URLs begin with the name of a bucket or a container."""


def is_url(where: str) -> bool:
    """Return whether the name of a run folder is a URL and not a path."""
    return "://" in where


def local_path(key: str, value: str | Path) -> Path:
    """Return the path that a user means.

    Args:
        key: of the setting or option, for the message.
        value: what was given, a path or a ``file://`` URL.

    Raises:
        UserError: it is not a path of this system, or a home folder in it is not known.
    """
    try:
        return Path(_expanded(_without_file_scheme(str(value))))
    except ValueError as error:
        raise UserError(key, str(value), str(error)) from None


def output_path(key: str, value: str | Path, kind: Kind) -> Path:
    """Return the path of a file or folder that is to be written, after a check that it can be; nothing is written.

    Args:
        key: as of `local_path`.
        value: as of `local_path`.
        kind: what it is to be. A file's folder must exist; folders are created.

    Raises:
        UserError: as `local_path`; or something else is in the place, or it cannot be written.
    """
    path = local_path(key, value)
    problem = _why_not_writable(path, kind)
    if problem:
        raise UserError(key, str(path), problem)
    return path


def run_location(key: str, value: str | Path) -> str:
    """Return the URL or the path of a run folder.

    Raises:
        UserError: as `local_path`; or it is a URL of an unknown protocol, or one that names no folder.
    """
    text = str(value)
    if not is_url(text):
        return str(local_path(key, text))
    try:
        _check_text(text)
        _check_url(text)
    except ValueError as error:
        raise UserError(key, text, str(error)) from None
    return text


def stored_path(text: str) -> str:
    """Return a path as it is stored in a configuration: absolute, or as it is if it begins with ``~/``.

    Raises:
        ValueError: it is not a path of this system, or begins with the name of an unknown user.
    """
    text = _without_file_scheme(text)
    _check_path(text)
    is_portable = text.partition("/")[0] == "~"
    return text if is_portable else str(Path(_expanded(text)).absolute())


StoredPath = Annotated[str, AfterValidator(stored_path)]
"""The type of a setting that is a path."""


def _without_file_scheme(text: str) -> str:
    """Return the path in a ``file://`` URL; any other text unchanged."""
    if not text.startswith("file://"):
        return text
    from urllib.request import url2pathname

    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path.strip("/"):
        raise ValueError("must be file:///PATH with the absolute path of a file or folder on this machine")
    return url2pathname(parts.path)


def _check_text(text: str) -> None:
    if not text.strip():
        raise ValueError("is empty, and must be a path")
    if not text.isprintable():
        raise ValueError("has a character that cannot be printed, e.g. a line break")


def _check_path(text: str) -> None:
    """Check the text of a path, without a look at the disk but for variables.

    Raises:
        ValueError: it is not one.
    """
    _check_text(text)
    scheme = _SCHEME.match(text)
    if is_url(text):
        raise ValueError("is a URL, and a path on this machine is needed here")
    if os.name == "posix" and _WINDOWS.match(text):
        raise ValueError("is a path of Windows, and this system has none of them")
    if scheme and (text[scheme.end() :].startswith("/") or scheme[1] in _BUCKETS):
        raise ValueError(f"is not a URL: that needs {scheme[1]}:// with two slashes; a folder of this name is ./{text}")
    if _VARIABLE.search(text) and not os.path.lexists(text):
        raise ValueError("has a variable in it, and variables are not expanded here; write the path without")
    size, longest = len(os.fsencode(text)), max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > MAX_NAME or size > MAX_PATH:
        allowed = f"a name has at most {MAX_NAME} bytes, and a path {MAX_PATH:,}"
        raise ValueError(f"is too long ({longest:,} bytes in one name, {size:,} in all): {allowed}")


def _expanded(text: str) -> str:
    """Return a path with the home folder that it begins with, if it does."""
    _check_path(text)
    if not text.startswith("~"):
        return text
    name, slash, rest = text.partition("/")
    home = _home() if name == "~" else os.path.expanduser(name)
    if home == name:
        raise ValueError(f"there is no user {name[1:]} here; a folder of this name is ./{text}")
    return f"{home}{slash}{rest}"


def _home() -> str:
    """Return the home folder of the user.

    Raises:
        ValueError: none is known.
    """
    home = os.environ.get("HOME")
    if home and os.path.isabs(home):
        return home.rstrip("/")
    import pwd  # on POSIX only

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise ValueError("no home folder is known for this user: set HOME, or write the path without ~") from None


def _check_url(text: str) -> None:
    """Check a URL of a run folder.

    Raises:
        ValueError: the protocol is unknown, or it names no folder.
    """
    from fsspec.registry import known_implementations

    protocol = text.partition("://")[0].rpartition("::")[2]
    if protocol not in known_implementations:
        nearest = difflib.get_close_matches(protocol.lower(), _NAMED, n=1, cutoff=0.0)[0]
        raise ValueError(f"is not a URL that can be used here: no protocol {protocol!r}; did you mean {nearest}://...?")
    try:
        parts = urlsplit(text.rpartition("::")[2])
        host, path = parts.netloc.rpartition("@")[2], parts.path.strip("/")
    except ValueError as error:
        raise ValueError(f"is not a URL that can be used here ({error})") from None
    if protocol in ("file", "local"):
        _without_file_scheme(f"file://{text.partition('://')[2]}")
    elif not (host or path) or (protocol in _BUCKETS and not host):
        raise ValueError(f"names no folder: write {protocol}://BUCKET/FOLDER")


def _why_not_writable(path: Path, kind: Kind) -> str | None:
    """Return what prevents a file or folder from being written; None if nothing does."""
    if path.is_symlink() and not path.exists():
        return f"is a symbolic link to {os.readlink(path)}, which does not exist"
    if any(parent.is_symlink() and not parent.exists() for parent in path.parents):
        return "one of the folders in it is a symbolic link to one that does not exist"
    existing = next((place for place in (path, *path.absolute().parents) if os.path.lexists(place)), Path("/"))
    try:
        mode = existing.stat().st_mode
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    if existing == path:
        if kind == "file" and stat.S_ISDIR(mode):
            return "is a folder"
        if not (stat.S_ISDIR(mode) or (kind == "file" and stat.S_ISREG(mode))):
            return "is a file, and a folder is needed" if stat.S_ISREG(mode) else f"is not a {kind}"
        existing = path if kind == "folder" else path.absolute().parent
    elif not stat.S_ISDIR(mode):
        return f"{existing} is not a folder"
    elif kind == "file" and existing != path.absolute().parent:
        return "its folder does not exist"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"cannot be written: no permission to write to {existing}"
    return None

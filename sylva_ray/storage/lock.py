"""A lock on a folder: one process at a time writes to a run, a sweep or a pre-training.

The operating system holds the lock on the file ``.lock`` and releases it when the process ends, however it ends, so
that a lock never remains behind a dead process. The content of the file says who holds it. Readers need no lock: files
are replaced in one step, and checkpoints do not change.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from sylva_ray.core.errors import UserError
from sylva_ray.core.processes import is_running

LOCK = ".lock"
"""Name of the file in a locked folder."""

POLL_S = 0.1
"""Seconds between two attempts."""

ORPHAN_S = 30.0
"""Seconds that a process may take to end after the driver that started it was killed."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        pid: its process id.
        host: name of its machine.
        driver: process id of the command that started it on the same machine, and with which it ends; None: it is one.
    """

    pid: int
    host: str
    driver: int | None = None

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Read who holds a lock; None where the file does not say so yet."""
        try:
            content = json.loads(path.read_text())
            return cls(int(content["pid"]), str(content["host"]), content["driver"] and int(content["driver"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def is_ending(self) -> bool:
        """Return whether the command that started it was killed on this machine, so that it ends soon, too."""
        return self.driver is not None and self.host == socket.gethostname() and not is_running(self.driver)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextmanager
def folder_lock(folder: Path, key: str, driver: int | None = None, wait_s: float = 0.0) -> Iterator[None]:
    """Create a folder if necessary, and lock it for as long as the block lasts.

    A folder that was created and is still empty after the block is removed again.

    Args:
        folder: the folder.
        key: name of the setting, for the message.
        driver: see `Holder`.
        wait_s: seconds to wait for a process that holds the lock; for one that is about to end, `ORPHAN_S`.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    with ExitStack() as stack:
        if not folder.exists():
            stack.callback(_remove_if_empty, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(folder / LOCK, key, str(folder), driver, wait_s))
        except OSError as error:
            raise UserError(key, str(folder), f"cannot be written ({error.strerror})") from None
        yield


@contextmanager
def file_lock(path: Path, key: str, what: str, driver: int | None = None, wait_s: float = 0.0) -> Iterator[None]:
    """Lock a file, which exists for as long as the block lasts.

    Args:
        path: the file; its folder must exist.
        key: name of the setting, for the message.
        what: what is locked, for the message.
        driver: see `Holder`.
        wait_s: see `folder_lock`.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be created.
    """
    started = time.monotonic()
    while (file := _try_to_lock(path)) is None:
        holder = Holder.read(path)
        limit_s = max(wait_s, ORPHAN_S) if holder is not None and holder.is_ending() else wait_s
        if time.monotonic() - started >= limit_s:
            fix = f"is being used by {holder or 'another process'}; wait until it ends, or choose another folder"
            raise UserError(key, what, fix)
        time.sleep(POLL_S)
    with file:
        with suppress(OSError):  # a full disk: the lock holds without its content
            file.truncate(0)
            file.write(json.dumps(asdict(Holder(os.getpid(), socket.gethostname(), driver))))
            file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _try_to_lock(path: Path) -> IO[str] | None:
    """Open and lock a file; None where another process holds it."""
    while True:
        file = _open(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            text = (
                f"{path.parent} is on a file system without locks ({error.strerror}): let one process at a time use it"
            )
            warnings.warn(text, stacklevel=2)
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process that held it has removed it in the meantime


def _open(path: Path) -> IO[str]:
    """Open or create a lock file; opening a pipe by that name might never end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        file = open(os.open(path, flags, 0o666), "a")  # noqa: SIM115  # the caller closes it, which releases the lock
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a pipe, a folder
            raise UserError("lock", str(path), "is not a file of ours; remove it") from None
        raise
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise UserError("lock", str(path), "is not a file of ours; remove it")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, as a rule
        folder.rmdir()

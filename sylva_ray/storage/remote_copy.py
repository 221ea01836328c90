"""A run folder elsewhere: ``s3://bucket/runs/a``, or any other URL that fsspec knows. Only this file knows of it.

    writers ──► local folder ──► push, after every step ──► URL ──► pull: --resume on any machine, evaluate, export, ...

A push sends first what is small and rewritten, then every new checkpoint, its manifest last, and only then drops old ones. So
wherever it is cut, the URL holds a whole checkpoint: the newest, or the one before.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from sylva_ray.config.experiment import CONFIG
from sylva_ray.core.credentials import mask_credentials
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.storage.checkpoint import MANIFEST
from sylva_ray.storage.claim import check_claim
from sylva_ray.storage.jsonl import read_records
from sylva_ray.storage.run_folder import CHECKPOINTS, RECORDS, RunFolder

CACHE = Path("~/.cache/sylva_ray/runs")
"""Where the local folders are."""


def is_url(where: str) -> bool:
    """Whether a run folder's name is a URL, and not a path."""
    return "://" in where


class RemoteFolder:
    """The URL of a run and its local folder. Not for two processes at once (`held` sees to that on one machine).

    Args:
        url: without a slash at its end.
        local: None: one below `CACHE`, the same for the same URL.

    Raises:
        UserError: no such protocol, or what it needs is not installed.
    """

    def __init__(self, url: str, local: Path | None = None) -> None:
        self.url = url.rstrip("/")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        self.local = local or CACHE.expanduser() / f"{PurePosixPath(self.url).name}-{digest}"
        self._files, self._root = _filesystem(self.url)
        self._sent: dict[str, tuple[int, int]] = {}
        self._known: dict[str, int] | None = None

    def __str__(self) -> str:
        return mask_credentials(self.url)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else on this machine works on the local folder meanwhile.

        Raises:
            UserError: somebody does."""
        self.local.parent.mkdir(parents=True, exist_ok=True)
        with open(self.local.with_name(f"{self.local.name}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fix = "is being used by another process on this machine; wait for it"
                raise UserError("run folder", str(self), fix) from None
            yield

    def start(self) -> None:
        """For a new run: nothing there, an empty folder here.

        Raises:
            UserError: the URL is not free, or cannot be reached."""
        names = self._asked(self._list)
        check_claim(str(self), "run", is_present=CONFIG in names, is_empty=not names, resume=False)
        shutil.rmtree(self.local, ignore_errors=True)

    def pull(self) -> None:
        """Make the local folder a copy of the URL. One that is ahead (the last pushes failed) is left as it is.

        Raises:
            UserError: there is no run, or the URL cannot be reached."""
        names = self._asked(self._list)
        if CONFIG not in names:
            raise UserError("run folder", str(self), "holds no run")
        content = self._asked(lambda: self._files.cat_file(f"{self._root}/{RECORDS}")) if RECORDS in names else b""
        if (self.local / CONFIG).exists() and len(read_records(self.local / RECORDS)) > content.count(b"\n"):
            return
        shutil.rmtree(self.local, ignore_errors=True)
        for name in names:
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self._asked(lambda name=name: self._files.cat_file(f"{self._root}/{name}")))  # type: ignore[misc]

    def push(self) -> None:
        """Bring the URL up to the local folder.

        Raises:
            RunError: it could not be; what is there is a whole run all the same."""
        try:
            if self._known is None:
                self._known = self._list()
            local = {str(path.relative_to(self.local)): path for path in self.local.rglob("*") if _counts(path)}
            for name in sorted(local, key=_order):
                self._send(name, local[name])
            steps = {str(PurePosixPath(name).parent) for name in local if _is_checkpoint(name)}
            old = [n for n in self._known if _is_checkpoint(n) and str(PurePosixPath(n).parent) not in steps]
            for name in sorted(old, key=_order, reverse=True):  # the manifest first: a rest does not count
                self._files.rm_file(f"{self._root}/{name}")
                del self._known[name]
        except Exception as error:  # every storage has its own
            raise RunError(f"{self} could not be written ({_reason(error)})") from error

    def _send(self, name: str, path: Path) -> None:
        """One file, unless it is there. A checkpoint's files never change, so their size tells."""
        assert self._known is not None, "listed by `push`"
        status = path.stat()
        stamp = status.st_size, status.st_mtime_ns
        if self._sent.get(name) == stamp or (_is_checkpoint(name) and self._known.get(name) == status.st_size):
            return
        content = path.read_bytes()
        target = f"{self._root}/{name}"
        if _is_local(self._files):  # where a write is not one step: a draft, and then its name
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            draft = f"{target.rpartition('/')[0]}/.{path.name}"
            self._files.pipe_file(draft, content)
            os.replace(draft, target)
        else:
            self._files.pipe_file(target, content)
        self._sent[name], self._known[name] = stamp, len(content)

    def _list(self) -> dict[str, int]:
        """``{name: bytes}`` of the files at the URL."""
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return {}
        found = self._files.find(self._root, detail=True)
        names = {path.removeprefix(self._root).lstrip("/"): info["size"] for path, info in found.items()}
        return {name: size for name, size in names.items() if name and not PurePosixPath(name).name.startswith(".")}

    def _asked(self, ask: Any) -> Any:
        try:
            return ask()
        except Exception as error:  # every storage has its own
            raise UserError("run folder", str(self), f"cannot be reached ({_reason(error)})") from None


@contextmanager
def run_folder_at(
    where: str, purpose: Literal["start", "resume", "read", "change"]
) -> Iterator[tuple[RunFolder, RemoteFolder | None]]:
    """Give a run folder that is on this machine. Of a URL it is a copy, which is sent back if the purpose is to change it.

    Args:
        where: a path, or a URL.
        purpose: what is done with the folder. A run (``start``, ``resume``) sends its own steps to the URL.

    Yields:
        The local folder, and the remote one (None where ``where`` is a path).

    Raises:
        UserError: the URL cannot be used, holds no run, or is not free.
        RunError: the changes could not be sent.
    """
    if not is_url(where):
        yield RunFolder(where), None
        return
    remote = RemoteFolder(where)
    with remote.held():
        if purpose == "start":
            remote.start()
        else:
            remote.pull()
        try:
            yield RunFolder(remote.local), remote
        except (KeyboardInterrupt, SystemExit, RunError):
            if purpose == "change":  # what was measured until now
                with suppress(RunError):
                    remote.push()
            raise
        if purpose == "change":
            remote.push()


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(
            "run folder", mask_credentials(url), f"is no URL that can be used here ({_reason(error)})"
        ) from None
    return files, root.rstrip("/")


def _is_local(files: Any) -> bool:
    return "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)


def _is_checkpoint(name: str) -> bool:
    return name.startswith(f"{CHECKPOINTS}/")


def _counts(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _order(name: str) -> tuple[bool, str, bool, str]:
    """The small files, then checkpoint after checkpoint, the manifest of each last."""
    path = PurePosixPath(name)
    return _is_checkpoint(name), str(path.parent), path.name == MANIFEST, path.name


def _reason(error: BaseException) -> str:
    return mask_credentials(" ".join(str(error).split())[:200] or type(error).__name__)

"""Copies of run folders at a URL: ``s3://bucket/runs/a``, or any other that fsspec supports.

::

    run ──► local folder ──► push, after every stage ──► URL ──► pull: resume on any machine, evaluate, export, ...

A push sends the small files that change first, ``rounds.jsonl`` after the files that its lines name, then every new
checkpoint, its manifest last, and then deletes old checkpoints, and files that no line names any more. Wherever it is
interrupted, the URL holds a complete checkpoint: the newest, or the one before. If the first push is interrupted there
is none yet, and the run starts again.

Checkpoints share files of rows (`sylva_ray.storage.state_rows`). Each is sent once: for a later checkpoint the storage
copies it, without the head. A pull fetches it once and links it. Files of checkpoints pass in pieces, so that neither
needs memory for all states.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from sylva_ray.config.stored import RUN_CONFIG
from sylva_ray.core.credentials import mask_value
from sylva_ray.core.errors import RunError, UserError, reason_of
from sylva_ray.core.locations import is_url, local_path, output_path, run_location
from sylva_ray.storage.atomic import link_or_copy, replaced, write_json
from sylva_ray.storage.claim import check_claim
from sylva_ray.storage.client_tables import is_client_table, without_file
from sylva_ray.storage.lock import file_lock
from sylva_ray.storage.manifest import MANIFEST, stated_checksums, step_of
from sylva_ray.storage.run_folder import CHECKPOINTS, RECORDS, RunFolder

T = TypeVar("T")

STAMPS = ".sent.json"
"""File of the local folder that says which files of checkpoints are at the URL; it is not copied."""

CACHE = "~/.cache/sylva_ray/runs"
"""Where the local folders are."""


class RemoteFolder:
    """The URL of a run and its local copy. Only one process may use it at a time; see `locked`.

    Args:
        url: of the run folder.
        local: folder of the copy; None: one below `CACHE`, always the same for the same URL.

    Raises:
        UserError: the protocol is unknown, or what it needs is not installed.
    """

    def __init__(self, url: str, local: Path | None = None) -> None:
        self.url = url.rstrip("/")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        self.local = local or local_path("run folder", CACHE) / f"{PurePosixPath(self.url).name}-{digest}"
        self._files, self._root = _filesystem(self.url)
        self._sent = self._read_sent()  # {name: stamp} of local files that are at the URL
        self._remote_sizes: dict[str, int] | None = None  # {name: bytes} at the URL; None: not listed yet

    def __str__(self) -> str:
        return str(mask_value(self.url))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the local folder against other processes of this machine, for as long as the block lasts.

        Raises:
            UserError: another process has locked it.
        """
        self.local.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(self.local.with_name(f"{self.local.name}.lock"), "run folder", str(self)):
            yield

    def start(self) -> None:
        """Prepare a new run: check that the URL is free and empty the local folder.

        Raises:
            UserError: the URL is not free, or cannot be reached.
        """
        check_claim(str(self), self._read(self._list), RUN_CONFIG, "run", resume=False)
        shutil.rmtree(self.local, ignore_errors=True)
        self._sent.clear()

    def pull(self, marker: str = RUN_CONFIG) -> None:
        """Make the local folder a copy of the URL, unless it is ahead of it because the last pushes have failed.

        Args:
            marker: the file, or the folder of files, that shows that there is a run.

        Raises:
            UserError: there is no run, the URL cannot be reached, or the local folder is ahead with another run.
        """
        names = self._read(self._list)
        if not any(name.split("/")[0] == marker for name in names):
            raise UserError("run folder", str(self), "holds no run")
        if self._is_ahead(names):
            return
        shutil.rmtree(self.local, ignore_errors=True)
        self._sent.clear()
        if RECORDS in names:  # first, so that a run that is sent meanwhile adds no line whose file is not listed
            self._fetch(RECORDS)
        names = self._read(self._list)
        for name in filter(_is_manifest, names):
            self._fetch(name)
        digests = _digests({name: self.local / name for name in names})
        shared = {digest for digest, count in Counter(digests.values()).items() if count > 1}
        fetched: dict[str, Path] = {}
        for name in names:
            if name != RECORDS and not _is_manifest(name):
                digest = digests.get(name, "")
                self._fetch(name, fetched.get(digest))
                if digest in shared - fetched.keys() and _sha256(self.local / name) == digest:  # no damage is shared
                    fetched[digest] = self.local / name
        self._write_sent()

    def _is_ahead(self, names: Iterable[str]) -> bool:
        """Return whether the local folder holds the run at the URL with more records, or with a newer checkpoint.

        A push sends the records before the checkpoints, and may have been cut between them.

        Raises:
            UserError: it holds more records, of a run that is not the one at the URL.
        """
        folder = RunFolder(self.local)
        if not (folder.config_file.exists() and folder.records_file.exists()):
            return False
        here = _complete_lines(folder.records_file.read_bytes())
        there = _complete_lines(self._download(RECORDS)) if RECORDS in names else []
        newest_here, newest_there = (
            max((step_of(PurePosixPath(name).parent.name) or 0 for name in files if _is_manifest(name)), default=-1)
            for files in (self._local_manifests(), names)
        )
        has_newer = here == there and newest_here > newest_there
        if len(here) <= len(there) and not has_newer:
            return False
        has_config = RUN_CONFIG in names  # without it, the local file can restore it
        if here[: len(there)] != there or (
            has_config and folder.config_file.read_bytes() != self._download(RUN_CONFIG)
        ):
            fix = f"is not the run whose copy is in {self.local}, with more stages"
            raise UserError("run folder", str(self), f"{fix}; move that folder elsewhere, or delete it")
        return True

    def _local_manifests(self) -> list[str]:
        return [str(path.relative_to(self.local)) for path in (self.local / CHECKPOINTS).glob(f"*/{MANIFEST}")]

    def push(self) -> None:
        """Make the URL a copy of the local folder.

        Raises:
            RunError: it could not be written; the URL holds a complete run all the same.
        """
        try:
            if self._remote_sizes is None:
                self._remote_sizes = self._list()
            local = {str(path.relative_to(self.local)): path for path in self.local.rglob("*") if _is_copied(path)}
            digests = _digests(local)
            names = sorted(local, key=_order)
            sent = [name for name in names if name in digests and self._is_there(name, local[name])]
            there = {digests[name]: name for name in sent}  # the newest of equals
            for name in names:
                if self._is_there(name, local[name]):
                    continue
                twin = there.get(digests.get(name, ""))
                if twin is None or not self._copied_there(twin, name, local[name]):
                    self._send(name, local[name])
                if name in digests:
                    there.setdefault(digests[name], name)
            steps = {_step_folder(name) for name in local if _is_checkpoint(name)}
            old = [
                name
                for name in self._remote_sizes
                if (_is_checkpoint(name) and _step_folder(name) not in steps)
                or (is_client_table(name) and name not in local)
                or (f"{name}.damaged" in local and name not in local)  # set aside by a repair
            ]
            for name in sorted(old, key=_order, reverse=True):  # the manifest first: without it, the rest is ignored
                self._files.rm_file(self._remote_path(name))
                del self._remote_sizes[name]
        except Exception as error:  # every storage raises errors of its own types
            raise RunError(f"{self} could not be written ({reason_of(error, self.url)})") from error
        finally:
            self._write_sent()

    def _read_sent(self) -> dict[str, tuple[int, int, int]]:
        """Return the stamps of checkpoint files as the process before this one left them; none where it left none.

        A resumed run is pulled by one process and pushed by another, its coordinator.
        """
        try:
            stamps = json.loads((self.local / STAMPS).read_text())
            return {str(name): (int(size), int(time), int(inode)) for name, (size, time, inode) in stamps.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write_sent(self) -> None:
        with suppress(OSError):  # the next process then compares sizes
            kept = [name for name in self._sent if _is_checkpoint(name) and (self.local / name).exists()]
            write_json(self.local / STAMPS, {name: self._sent[name] for name in kept})

    def _send(self, name: str, path: Path) -> None:
        """Send a file."""
        assert self._remote_sizes is not None, "listed by `push`"
        size, *_ = stamp = _stamp(path)
        target = self._remote_path(name)
        if _is_local(self._files):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "rb") as source, replaced(Path(target), durable=False) as file:
                shutil.copyfileobj(source, file)
        elif _is_checkpoint(name):  # object stores write atomically
            self._files.put_file(str(path), target)
        else:  # may change meanwhile
            content = path.read_bytes()
            self._files.pipe_file(target, content)
            size = len(content)
        self._sent[name], self._remote_sizes[name] = stamp, size

    def _is_there(self, name: str, path: Path) -> bool:
        """Return whether the URL holds a local file.

        A checkpoint's files never change: one of equal size is the same, unless its step was computed again since it
        was sent or fetched, because the checkpoint there was damaged, or its push was cut on another machine.
        """
        assert self._remote_sizes is not None, "listed by `push`"
        size, *_ = stamp = _stamp(path)
        known = self._sent.get(name, stamp if _is_checkpoint(name) else None)
        return self._remote_sizes.get(name) == size and known == stamp

    def _copied_there(self, source: str, name: str, path: Path) -> bool:
        """Copy a file within the URL to ``name``, of the local ``path``; return False if its storage cannot."""
        assert self._remote_sizes is not None, "listed by `push`"
        here, there = self._remote_path(source), self._remote_path(name)
        try:
            if _is_local(self._files):
                Path(there).parent.mkdir(parents=True, exist_ok=True)
                os.link(here, there)
            else:
                self._files.cp_file(here, there)
        except Exception:  # every storage raises errors of its own types; sending the file tells what is wrong
            return False
        self._sent[name], self._remote_sizes[name] = _stamp(path), self._remote_sizes[source]
        return True

    def _list(self) -> dict[str, int]:
        """Return ``{name: bytes}`` of the files at the URL."""
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return {}
        listing = self._files.find(self._root, detail=True)
        sizes = {path.removeprefix(self._root).lstrip("/"): info["size"] for path, info in listing.items()}
        return {name: size for name, size in sizes.items() if name and _may_be_copied(name)}

    def _fetch(self, name: str, twin: Path | None = None) -> None:
        """Fetch a file, or link it to ``twin``, which has the same content."""
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if twin is not None:
            link_or_copy(twin, target)
        elif _is_checkpoint(name):
            self._read(lambda: self._files.get_file(self._remote_path(name), str(target)))
        else:
            target.write_bytes(self._download(name))
        self._sent[name] = _stamp(target)

    def _download(self, name: str) -> bytes:
        return self._read(lambda: bytes(self._files.cat_file(self._remote_path(name))))

    def _remote_path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _read(self, read: Callable[[], T]) -> T:
        """Return what ``read`` returns; any error means that the URL cannot be reached."""
        try:
            return read()
        except Exception as error:  # every storage raises errors of its own types
            raise UserError("run folder", str(self), f"cannot be reached ({reason_of(error, self.url)})") from None


@contextmanager
def run_folder_at(
    where: str, purpose: Literal["start", "resume", "read", "change", "repair"]
) -> Iterator[tuple[RunFolder, RemoteFolder | None]]:
    """Provide a run folder on this machine. For a URL this is a local copy, which is sent back if it may be changed.

    Args:
        where: a path, or a URL.
        purpose: what is done with the folder. A run (``start``, ``resume``) sends its own stages to the URL.

    Yields:
        The local folder, and the remote one (None where ``where`` is a path).

    Raises:
        UserError: the URL cannot be used, holds no run, or is not free.
        RunError: the changes could not be sent.
    """
    where = run_location("--out" if purpose == "start" else "RUN", where)
    if not is_url(where):
        folder = RunFolder(output_path("--out", where, "folder") if purpose == "start" else where)
        if purpose not in ("change", "repair"):
            yield folder, None
            return
        if purpose == "change" or not folder.checkpoints.root.exists():
            folder.check_has_run()
        with folder.locked():
            yield folder, None
        return
    remote = RemoteFolder(where)
    with remote.locked():
        if purpose == "start":
            remote.start()
        else:
            remote.pull(marker=CHECKPOINTS if purpose == "repair" else RUN_CONFIG)
        try:
            yield RunFolder(remote.local), remote
        except (KeyboardInterrupt, SystemExit, RunError):
            if purpose == "change":  # send what was measured until now
                with suppress(RunError):
                    remote.push()
            raise
        if purpose in ("change", "repair"):
            remote.push()


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    import fsspec

    try:
        is_file = url.startswith("file://")
        files, root = fsspec.core.url_to_fs(str(local_path("run folder", url)) if is_file else url)
    except (ValueError, ImportError, OSError) as error:
        fix = f"is not a URL that can be used here ({reason_of(error, url)})"
        raise UserError("run folder", url, fix) from None
    return files, root.rstrip("/")


def _complete_lines(content: bytes) -> list[object]:
    """Return the records of a ``rounds.jsonl``, without the names of their files.

    A resume writes the same ones with their keys in another order and, with another version of pyarrow, other files.
    """
    lines = content.split(b"\n")[:-1]
    try:
        return [without_file(json.loads(line)) for line in lines]
    except ValueError:  # damaged: the same only if all bytes are
        return [*lines]


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return the size of a file and what tells it from those that had its name before: time of change, and inode."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _is_local(files: Any) -> bool:
    return "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)


def _is_checkpoint(name: str) -> bool:
    return name.startswith(f"{CHECKPOINTS}/")


def _is_manifest(name: str) -> bool:
    return _is_checkpoint(name) and PurePosixPath(name).name == MANIFEST


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of ``{name: file}`` of checkpoints by their manifests, where these can be read."""
    found: dict[str, str] = {}
    for name, path in files.items():
        if _is_manifest(name):
            folder = str(PurePosixPath(name).parent)
            found |= {f"{folder}/{file}": digest for file, digest in stated_checksums(path).items()}
    return {name: digest for name, digest in found.items() if name in files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_folder(name: str) -> PurePosixPath:
    return PurePosixPath(name).parent


def _is_copied(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _may_be_copied(name: str) -> bool:
    """Return whether a name at the URL is one of a run; names of object stores may hold ``..``, and leave the copy."""
    path = PurePosixPath(name)
    return not path.name.startswith(".") and ".." not in path.parts


def _order(name: str) -> tuple[bool, bool, int, str, bool, str]:
    """Sort the small files first, the records last of them, then checkpoint after checkpoint, each manifest last."""
    path = PurePosixPath(name)
    step = step_of(path.parent.name) or 0
    return _is_checkpoint(name), name == RECORDS, step, str(path.parent), path.name == MANIFEST, path.name

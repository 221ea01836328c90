"""The manifest of a checkpoint: which files it has, and their checksums.

It is written last and in one step. A folder without a manifest is therefore what an interruption leaves, and one whose
files do not match its manifest has been damaged since; both are passed over for an older checkpoint. A manifest that
says something that this package does not write is refused: the folder was changed by hand, or comes from another
version.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sylva_ray.core.errors import UserError
from sylva_ray.core.files import read_regular_file
from sylva_ray.core.text import abbreviated
from sylva_ray.storage.arrays import Content, forget_pages, read_content
from sylva_ray.storage.atomic import sync_folder, write_atomically
from sylva_ray.storage.reading import parse_json

MANIFEST = "manifest.json"

_FOLDER = re.compile(r"([a-z]+)_(\d{4,12})")


class DamagedError(Exception):
    """A checkpoint is not what was written; the message says which part."""


class Manifest(BaseModel):
    """``manifest.json``.

    Attributes:
        step: position of the stage in the run, from 0.
        sha256: ``{file name: checksum}`` of the other files in the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    step: int = Field(ge=0)
    sha256: dict[str, str]


def folder_name(step: int, unit: str = "round") -> str:
    """Return the name of a step's folder; with more than 9,999 steps, names have more than four digits."""
    return f"{unit}_{step:04d}"


def step_of(name: str, unit: str = "round") -> int | None:
    """Return the step of a folder by its name; None for the names of other folders."""
    match = _FOLDER.fullmatch(name)
    return int(match[2]) if match and folder_name(int(match[2]), unit) == name else None


def steps_in(root: Path, unit: str = "round") -> list[int]:
    """Return the steps that have a folder in ``root``, complete or not, the oldest first."""
    found = (step_of(path.name, unit) for path in root.glob(f"{unit}_*"))
    return sorted(step for step in found if step is not None)


def remove_step(folder: Path) -> None:
    """Delete the folder of a step, its manifest first: without it, the rest does not count."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_step(folder: Path, step: int, files: Mapping[str, bytes], others: Mapping[str, str] | None = None) -> None:
    """Write the folder of a step so that it survives a loss of power; the manifest comes last.

    Args:
        folder: of the step.
        step: see `Manifest`.
        files: ``{file name: content}``.
        others: ``{file name: SHA-256}`` of files that the folder holds already; None: it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=others is not None)
    for name, content in files.items():
        write_atomically(folder / name, content, durable=True)
    write_atomically(folder / MANIFEST, write_manifest(step, files, others), durable=True)
    sync_folder(folder.parent)


def write_manifest(step: int, files: Mapping[str, bytes], others: Mapping[str, str] | None = None) -> str:
    """Return the text of a manifest.

    Args:
        step: see `Manifest`.
        files: ``{file name: content}``.
        others: ``{file name: SHA-256}`` of further files.
    """
    checksums = dict(others or {}) | {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return json.dumps({"step": step, "sha256": checksums}, sort_keys=True)


def stated_checksums(path: Path) -> dict[str, str]:
    """Return ``{file name: SHA-256}`` of a manifest, whose files are not looked at; empty if it cannot be read."""
    try:
        return Manifest.model_validate(parse_json(path.read_bytes())).sha256
    except (OSError, ValueError):
        return {}


def read_checked(
    folder: Path, needed: Iterable[str], allowed: Iterable[str], rows: re.Pattern[str] | None = None
) -> dict[str, Content]:
    """Read the files of a checkpoint and check them against its manifest.

    Args:
        folder: of the checkpoint.
        needed: names of the files that every checkpoint has.
        allowed: names of the others that it may have.
        rows: a pattern of further names, of files of rows.

    Returns:
        ``{file name: content}``; large files of rows are mapped.

    Raises:
        FileNotFoundError: there is no manifest: the checkpoint is not complete.
        DamagedError: the manifest is not JSON, or a file is missing or does not match its checksum.
        UserError: the manifest says something that this package does not write.
    """
    path = folder / MANIFEST
    try:
        raw = parse_json(read_regular_file(path, "checkpoint"))
    except UserError:
        raise
    except ValueError:
        raise DamagedError(f"{folder.name}: {MANIFEST} is not JSON") from None
    manifest = _validated(raw, path, set(needed), set(allowed), rows)
    contents: dict[str, Content] = {}
    for name, checksum in manifest.sha256.items():
        try:
            is_rows = rows is not None and rows.fullmatch(name) is not None
            contents[name] = (read_content if is_rows else read_regular_file)(folder / name, "checkpoint")
        except FileNotFoundError:
            raise DamagedError(f"{folder.name}: {name} is missing") from None
        if hashlib.sha256(contents[name]).hexdigest() != checksum:
            raise DamagedError(f"{folder.name}: {name} does not match its checksum")
        forget_pages(contents[name])
    return contents


def _validated(raw: object, path: Path, needed: set[str], allowed: set[str], rows: re.Pattern[str] | None) -> Manifest:
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = abbreviated(".".join(map(str, problem["loc"])), length=100)
        raise _refusal(path, f"{where}: {problem['msg'].lower()}") from None
    names = manifest.sha256.keys()
    if strange := sorted(n for n in names - needed - allowed if rows is None or not rows.fullmatch(n)):
        raise _refusal(path, f"it lists {strange[0][:80]!r}, which is not a file of a checkpoint")
    if missing := sorted(needed - names):
        raise _refusal(path, f"it does not list {missing[0]}")
    if folder_name(manifest.step, path.parent.name.partition("_")[0]) != path.parent.name:
        raise _refusal(path, f"its step is {manifest.step}")
    return manifest


def _refusal(path: Path, reason: str) -> UserError:
    fix = f"delete {path.parent.name} to use an older checkpoint"
    return UserError("checkpoint", str(path), f"is not a manifest as this version writes them ({reason}); {fix}")

"""Check that an output folder is free or holds the work to resume, for runs, sweeps and pre-trainings alike."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sylva_ray.core.errors import UserError
from sylva_ray.storage.atomic import draft_of, write_atomically
from sylva_ray.storage.lock import LOCK


def check_claim(
    folder: str, names: Collection[str], marker: str, kind: str, resume: bool, leftovers: Collection[str] = ()
) -> None:
    """Check that a folder may be written to.

    Args:
        folder: path or URL, for the messages.
        names: names of what is in it; empty where it does not exist.
        marker: name of the file that every folder of this kind has.
        kind: noun for what it is to hold, e.g. ``run``.
        resume: whether it must hold one already; else it must be empty.
        leftovers: names of files that a process may leave that is killed before it has written the marker.

    Raises:
        UserError: it is not free, or there is nothing to resume.
    """
    if marker in names:
        if not resume:
            fix = f"already holds a {kind}; add --resume to continue it, or choose another"
            raise UserError("--out", folder, fix)
    elif set(names) - {LOCK, draft_of(Path(marker)).name, *leftovers}:
        raise UserError("--out", folder, f"is not empty and holds no {kind}; choose another folder")
    elif resume:
        raise UserError("--out", folder, f"holds no {kind} to resume")


def list_names(folder: Path) -> list[str]:
    """Return the names of what is in a folder; none where it does not exist.

    Raises:
        UserError: it cannot be listed, e.g. because it is a file.
    """
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError("--out", str(folder), f"cannot be used ({error.strerror}); choose another folder") from None


def write_marker(marker: Path, content: str, replace: bool = False) -> None:
    """Create a folder and write the file that marks it as taken. One that is there already is never written again.

    Args:
        marker: path of the file.
        content: text of the file.
        replace: whether one that is there already is replaced after all.

    Raises:
        UserError: it cannot be written.
    """
    if marker.exists() and not replace:
        return
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, content, durable=True)
    except OSError as error:
        raise UserError("--out", str(marker.parent), f"cannot be written ({error.strerror})") from None

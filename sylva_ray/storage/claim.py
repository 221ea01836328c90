"""Whether a folder may be written to: it is free, or it holds what is to be resumed."""

from __future__ import annotations

from pathlib import Path

from sylva_ray.core.errors import UserError


def check_claim(where: str, content: str, *, is_present: bool, is_empty: bool, resume: bool) -> None:
    """Check that a folder is free or, with ``resume``, holds what is to be resumed.

    Args:
        where: The folder, for the error message.
        content: What the folder is for, e.g. ``run``.
        is_present: Whether it holds such content.
        is_empty: Whether it holds nothing at all, or does not exist.
        resume: Whether to continue what it holds.

    Raises:
        UserError: It holds such content already, or something else, or there is nothing to resume.
    """
    if is_present:
        if not resume:
            fix = f"already holds a {content}; add --resume to continue it, or choose another"
            raise UserError("--out", where, fix)
    elif not is_empty:
        raise UserError("--out", where, f"is not empty and holds no {content}; choose another folder")
    elif resume:
        raise UserError("--resume", where, f"holds no {content} to resume")


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing, or does not exist."""
    return not folder.exists() or not any(folder.iterdir())

"""Writing a comparison to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import output_path
from sylva_ray.reports.compare.rows import Row
from sylva_ray.reports.compare.tables import csv_text, markdown, page
from sylva_ray.storage.atomic import write_atomically

FORMATS = (".html", ".csv", ".md")
"""Suffixes of the files that can be written."""


def check_targets(paths: Sequence[str | Path]) -> list[Path]:
    """Check that the files can be written, before the comparison is computed.

    Args:
        paths: the files.

    Returns:
        The same, with the home folder in place of ``~``.

    Raises:
        UserError: unknown suffix, or a place where no file can be written.
    """
    for path in paths:
        if Path(path).suffix.lower() not in FORMATS:
            raise UserError("--out", str(path), f"must end in one of {', '.join(FORMATS)}")
    return [output_path("--out", path, "file") for path in paths]


def write(rows: Sequence[Row], path: Path, left_out: Sequence[str] = ()) -> None:
    """Write a comparison in the format that the file's suffix names.

    Args:
        rows: rows of the comparison.
        path: the file.
        left_out: sentences about runs that were left out; they are shown in HTML only.

    Raises:
        UserError: the file cannot be written.
    """
    check_targets([path])
    match path.suffix.lower():
        case ".csv":
            text = csv_text(rows)
        case ".md":
            text = markdown(rows)
        case _:
            from sylva_ray.reports.pages.compare import render

            text = render(page(rows, left_out))
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError("--out", str(path), f"cannot be written ({error.strerror})") from None

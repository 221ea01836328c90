"""The files that a comparison is written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sylva_ray.core.errors import UserError
from sylva_ray.reports.compare.rows import Row
from sylva_ray.reports.compare.tables import csv_text, markdown, page
from sylva_ray.storage.atomic import check_target, write_atomically

FORMATS = (".html", ".csv", ".md")


def check_targets(paths: Sequence[Path]) -> None:
    """Raise before any work is done.

    Raises:
        UserError: a format that we do not write, or a place where nothing can be written.
    """
    for path in paths:
        if path.suffix.lower() not in FORMATS:
            raise UserError("--out", str(path), f"must end in one of {', '.join(FORMATS)}")
        check_target("--out", path)


def write(rows: Sequence[Row], path: Path, left_out: Sequence[str] = ()) -> None:
    """The comparison in the format of the file's name.

    Raises:
        UserError: it cannot be written.
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

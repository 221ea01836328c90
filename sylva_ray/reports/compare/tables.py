"""Tables and plots of a comparison, for the terminal, Markdown, CSV, HTML and PNG."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from rich.text import Text

from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.compare.legend import legend
from sylva_ray.reports.compare.points import panels
from sylva_ray.reports.compare.result import result_sentence
from sylva_ray.reports.compare.rows import ACCURACIES, STATISTICS, Row
from sylva_ray.reports.compare.runs import BENIGN
from sylva_ray.reports.compare.verdicts import (
    WARNING_MARK,
    attack_labels,
    attack_title_from,
    check_marks,
    dominance,
    footnotes,
    front_membership,
    method_rows,
    notes,
    sentences,
    strongest_attack,
    warnings,
)
from sylva_ray.reports.pages.wording import bytes_text

if TYPE_CHECKING:
    from sylva_ray.reports.pages.compare import Page

NOT_MEASURED = "–"
"""The cell of an attack that a method's runs were not evaluated with."""

ACCURACY_NOTE = "an accuracy is mean / worst decile of the clients, in %, each ± its standard deviation over the seeds"
"""Explanation of the cells of accuracies."""


@dataclass(frozen=True)
class Column:
    """A column of the table, as text.

    Attributes:
        group: heading that adjacent columns share: a condition, ``cost``, or empty.
        heading: heading of the column.
        cells: one cell per row.
        kind: ``accuracy`` if each cell is "mean/worst decile"; else how the column is aligned.
    """

    group: str
    heading: str
    cells: tuple[str, ...]
    kind: Literal["text", "accuracy", "number"] = "number"


def columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of the table, from left to right, without the names of the rows.

    Plain accuracies are left out where the test images of all rows have equal class shares: they are the balanced ones.
    """
    front = front_membership(rows)
    kinds = dict(zip(ACCURACIES, ("plain", "balanced"), strict=True))
    if all(row.has_equal_shares for row in rows):
        del kinds["accuracy"]
    table = [
        Column("", "seeds", tuple(str(len(row.seeds)) for row in rows)),
        Column("", "front", tuple(front.get(row.name, "") for row in rows), "text"),
    ]
    for condition in (BENIGN, *attack_labels(rows)):
        for kind, heading in kinds.items():
            cells = tuple(_accuracy_cell(row, condition, kind) for row in rows)
            table.append(Column(condition, heading, cells, "accuracy"))
    for heading, cell in COSTS.items():
        table.append(Column("cost", heading, tuple(cell(row) for row in rows)))
    return [column for column in table if any(column.cells)]


def row_names(rows: Sequence[Row]) -> list[str]:
    """Return the letters and names of the rows, with a mark if there are warnings."""
    return [f"{row.letter} {_marked_name(row)}".strip() for row in rows]


def _marked_name(row: Row) -> str:
    return f"{row.name} {WARNING_MARK}" if row.warnings else row.name


COSTS: Mapping[str, Callable[[Row], str]] = {
    "collapsed": lambda row: f"{row.collapsed.mean:.3g}/{row.num_honest}" if row.collapsed else "",
    "upload": lambda row: bytes_text(row.upload_bytes.mean) if row.upload_bytes else "",
    "ratio": lambda row: f"{row.full_model_ratio.mean:,.0f}x" if row.full_model_ratio else "",
    "total": lambda row: bytes_text(row.total_bytes.mean) if row.total_bytes else "",
    "seconds": lambda row: _number_cell(row.seconds) if row.seconds else "",
}
"""Columns of costs: collapsed clients, upload per client and round, full model / upload, a run's bytes and seconds."""


def _accuracy_cell(row: Row, condition: str, kind: str) -> str:
    """Return e.g. ``62.8±1.2/47.0±2.5``, followed by the marks of failed checks if the accuracy is robust."""
    mean, worst = (row.value(condition, kind, statistic) for statistic in STATISTICS)
    if mean is None or worst is None:
        return "" if row.stage == "majority" else NOT_MEASURED
    marks = "" if condition == BENIGN else check_marks(row)
    return f"{percent_cell(mean)}/{percent_cell(worst)}{marks}"


def _number_cell(value: SeedMean) -> str:
    return f"{value.mean:,.0f}" + (f"±{value.std:,.0f}" if value.std else "")


def percent_cell(value: SeedMean) -> str:
    """Format an accuracy in per cent with its spread over the seeds, if there are several.

    >>> percent_cell(SeedMean(0.628, 0.012, 3)), percent_cell(SeedMean(0.628, None, 1))
    ('62.8±1.2', '62.8')
    """
    return f"{100 * value.mean:.1f}" + (f"±{100 * value.std:.1f}" if value.std is not None else "")


def markdown(rows: Sequence[Row]) -> str:
    """Return the table and all texts as Markdown."""
    texts = [
        *filter(None, [result_sentence(rows)]),
        *(f"**{text}**" for text in warnings(rows)),
        *sentences(rows),
        *legend(rows).lines(),
        *footnotes(rows),
        ACCURACY_NOTE,
        *notes(rows),
    ]
    return "\n".join([markdown_table(rows), "", *(f"* {text}" for text in texts)]) + "\n"


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table as Markdown."""
    shown = columns(rows)
    header = ["row", "method", *(_heading(column) for column in shown)]
    rule = ["---", "---", *("---" if column.kind == "text" else "---:" for column in shown)]
    body = [[row.letter, _marked_name(row), *(column.cells[i] for column in shown)] for i, row in enumerate(rows)]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, rule, *body)]
    return "\n".join(table)


def _heading(column: Column) -> str:
    """Return a heading that includes the group."""
    if column.group in ("", "cost"):
        return column.heading
    return column.group if column.heading == "plain" else f"{column.group}, {column.heading}"


def terminal_tables(rows: Sequence[Row], width: int) -> list[Table]:
    """Split the table into as few as possible that fit the terminal; each repeats the names of the rows.

    Args:
        rows: rows of the comparison.
        width: width of the terminal in characters.
    """
    labels = row_names(rows)
    name_width = min(max(len(label) for label in labels), max(16, width // 4))
    groups: dict[str, list[Column]] = {}
    for column in columns(rows):
        groups.setdefault(column.group, []).append(column)
    head, rest = groups.pop(""), list(groups.values())
    parts: list[list[Column]] = [head]
    for group in _fitting(rest, width - name_width - 4):
        if name_width + 4 + sum(map(_width, parts[-1])) + sum(map(_width, group)) > width:
            parts.append([])
        parts[-1] = [*parts[-1], *group]
    tables = []
    for part in parts:
        table = Table(box=None, padding=(0, 1), header_style="bold")
        table.add_column("method", width=name_width, overflow="fold")
        for column in part:
            table.add_column(
                Text(_two_lines(column)), justify="left" if column.kind == "text" else "right", no_wrap=True
            )
        for index, label in enumerate(labels):
            table.add_row(Text(label), *(Text(column.cells[index]) for column in part))
        tables.append(table)
    return tables


def _fitting(groups: Sequence[list[Column]], width: int) -> list[list[Column]]:
    """Divide the groups of columns that are wider than a terminal."""
    fitting = []
    for group in groups:
        is_wide = sum(map(_width, group)) > width
        fitting += [[column] for column in group] if is_wide else [group]
    return fitting


def remarks(rows: Sequence[Row], left_out: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """Return the texts below the tables on a terminal: the result, then what speaks against it, then the rest.

    Args:
        rows: rows of the comparison.
        left_out: sentences about runs that were left out.

    Returns:
        Pairs of a style of `rich` and the lines in it.
    """
    alarms = [f"{WARNING_MARK} {text}" for text in [*warnings(rows), *left_out]]
    return [
        ("bold", [*filter(None, [result_sentence(rows)])]),
        ("bold red", alarms),
        ("", sentences(rows)),
        ("", ["", "which row is which:", *legend(rows).lines(), ""]),
        ("red", footnotes(rows)),
        ("dim", [ACCURACY_NOTE, *notes(rows)]),
    ]


def _two_lines(column: Column) -> str:
    return column.heading if column.group in ("", "cost") else f"{column.group}\n{column.heading}"


def _width(column: Column) -> int:
    return 2 + max(len(text) for text in (*_two_lines(column).split("\n"), *column.cells))


# -- files -------------------------------------------------------------------------------------------------------------


def csv_text(rows: Sequence[Row]) -> str:
    """Return the table as CSV, with two lines per row: for the mean and for the worst decile of its clients.

    Accuracies are fractions; each has a column for its mean and one for its sample standard deviation over the seeds.
    """
    attacks = attack_labels(rows)
    above = {statistic: dominance(rows, statistic) for statistic in STATISTICS}
    lines = [_csv_line(row, statistic, attacks, above[statistic]) for row in rows for statistic in STATISTICS]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_line(row: Row, statistic: str, attacks: Sequence[str], above: Mapping[str, list[str]]) -> dict[str, object]:
    line: dict[str, object] = {
        "row": row.name,
        "method": row.method,
        "stage": row.stage,
        "statistic": statistic,
        "num_seeds": len(row.seeds),
        "seeds": " ".join(map(str, row.seeds)),
        "dataset": row.fleet["dataset.name"],
        "num_clients": row.num_clients,
    }
    for condition in (BENIGN, *attacks):
        for kind in ACCURACIES:
            name = f"benign_{kind}" if condition == BENIGN else f"robust_{kind}.{condition}"
            line |= _csv_value(name, row.value(condition, kind, statistic))
    line |= _csv_value("collapsed_clients", row.collapsed)
    line |= _csv_value("upload_bytes_per_client_round", row.upload_bytes)
    line |= _csv_value("full_model_ratio", row.full_model_ratio)
    line |= _csv_value("total_bytes", row.total_bytes)
    line |= _csv_value("seconds", row.seconds)
    line["on_front"] = "" if row.name not in above else int(not above[row.name])
    line["dominated_by"] = "; ".join(above.get(row.name, []))
    line["failed_checks"] = "; ".join(f"{check} (seed {' '.join(map(str, s))})" for check, s in row.failed.items())
    line["num_warnings"] = len(row.warnings)
    return line


def _csv_value(name: str, value: SeedMean | None) -> dict[str, float | str]:
    if value is None:
        return {name: "", f"{name}.std": ""}
    return {name: value.mean, f"{name}.std": "" if value.std is None else value.std}


def plot(rows: Sequence[Row], path: Path, kind: Literal["tradeoff", "bytes"] = "tradeoff") -> Path:
    """Write a plot as PNG.

    Args:
        rows: rows of the comparison.
        path: the file.
        kind: ``tradeoff`` for robust against benign accuracy, ``bytes`` for both against the upload.

    Returns:
        The path of the file.

    Raises:
        ValueError: no attack is common to all rows.
    """
    from sylva_ray.reports.figures.style import png
    from sylva_ray.reports.figures.tradeoff import draw_tradeoff

    drawn = panels(rows).get(kind)
    if drawn is None:
        raise ValueError("nothing can be plotted: no attack is common to all rows")
    path.write_bytes(png(draw_tradeoff(drawn)))
    return path


def page(rows: Sequence[Row], left_out: Sequence[str] = ()) -> Page:
    """Collect the contents of the HTML page, which `sylva_ray.reports.pages.compare.render` lays out.

    Args:
        rows: rows of the comparison.
        left_out: sentences about runs that were left out.
    """
    from sylva_ray.reports.pages.compare import Cell, Page, TableColumn

    def cell(row: Row, condition: str, kind: str) -> Cell:
        mean, worst = (row.value(condition, kind, statistic) for statistic in STATISTICS)
        if mean is None or worst is None:
            return Cell("" if row.stage == "majority" else NOT_MEASURED)
        return Cell(percent_cell(mean), percent_cell(worst), "" if condition == BENIGN else check_marks(row))

    shown = []
    for column in columns(rows):
        if column.kind == "accuracy":
            kind = ACCURACIES[column.heading == "balanced"]
            cells = [cell(row, column.group, kind) for row in rows]
        else:
            cells = [Cell(text) for text in column.cells]
        group = attack_title_from(rows, column.group) if column.kind == "accuracy" else column.group
        shown.append(TableColumn(group, column.heading, tuple(cells)))
    methods = method_rows(rows)
    attack = strongest_attack(rows)
    num_runs = sum(len(row.seeds) for row in methods if row.stage == "final")
    fleet = sorted({f"{row.fleet['dataset.name']}, {row.num_clients} clients" for row in methods})
    return Page(
        subtitle=f"{len(methods)} rows from {num_runs} runs on {' / '.join(fleet)}",
        attack=attack_title_from(rows, attack) if attack else "",
        result=result_sentence(rows),
        legend=legend(rows),
        letters=tuple(row.letter for row in rows),
        names=tuple(row.name for row in rows),
        muted=tuple(row.stage == "majority" for row in rows),
        warned=tuple(bool(row.warnings) for row in rows),
        columns=tuple(shown),
        warnings=(*warnings(rows), *left_out),
        sentences=tuple(sentences(rows)),
        footnotes=tuple(footnotes(rows)),
        notes=tuple(notes(rows, titled=True)),
        panels=panels(rows),
    )

"""The HTML page of a comparison: layout of the texts, tables and plots that `sylva_ray.reports.compare` prepares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from sylva_ray.reports.compare.legend import Legend
from sylva_ray.reports.figures.style import DARK, LIGHT
from sylva_ray.reports.figures.tradeoff import Panel, draw_tradeoff
from sylva_ray.reports.pages.run import figure_elements, page_environment

DESCRIPTIONS = {
    "tradeoff": "Benign against robust accuracy of every method",
    "bytes": "Benign and robust accuracy of every method against its upload",
}
"""Alternative texts of the figures, for screen readers."""


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Attributes:
        text: first line.
        small: second line, in small print.
        marks: marks of failed checks, after the text.
    """

    text: str
    small: str = ""
    marks: str = ""


@dataclass(frozen=True)
class TableColumn:
    """A column of the table.

    Attributes:
        group: heading that it shares with adjacent columns of the same group.
        heading: heading of the column.
        cells: one cell per row.
    """

    group: str
    heading: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Page:
    """Contents of the page as plain text.

    Attributes:
        subtitle: line below the title.
        attack: title of the attack that dominance refers to; empty if there is none.
        result: the first sentence; empty where nothing can be said.
        legend: which row is which.
        letters: of the rows; empty for a reference.
        names: names of the rows.
        muted: per row, whether it is a reference, shown in grey.
        warned: per row, whether its runs have warnings.
        columns: columns of the table.
        warnings: reasons why the numbers may not be comparable.
        sentences: which rows are dominated; the first one names those that are not.
        footnotes: failed checks and the runs' warnings.
        notes: explanations below the table.
        panels: panels of each plot, by name.
    """

    subtitle: str
    attack: str
    result: str
    legend: Legend
    letters: tuple[str, ...]
    names: tuple[str, ...]
    muted: tuple[bool, ...]
    warned: tuple[bool, ...]
    columns: tuple[TableColumn, ...]
    warnings: tuple[str, ...]
    sentences: tuple[str, ...]
    footnotes: tuple[str, ...]
    notes: tuple[str, ...]
    panels: Mapping[str, Sequence[Panel]]


def render(page: Page) -> str:
    """Render the page as self-contained HTML that follows the reader's light or dark scheme."""
    groups: list[tuple[str, int]] = []
    for column in page.columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = column.group, groups[-1][1] + 1
        else:
            groups.append((column.group, 1))

    def draw() -> dict[str, Figure]:
        return {name: draw_tradeoff(panels) for name, panels in page.panels.items()}

    figures = figure_elements([draw], DESCRIPTIONS)
    template = page_environment().get_template("compare.html.jinja")
    return template.render(page=page, groups=groups, figures=figures, light=LIGHT, dark=DARK)

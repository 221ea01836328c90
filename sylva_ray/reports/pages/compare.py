"""``sylva-ray compare --out FILE.html``: the page and the plots of many runs beside each other.

What they say is made in `sylva_ray.reports.compare`; here it is laid out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sylva_ray.reports.figures.style import DARK, LIGHT, svg
from sylva_ray.reports.figures.tradeoff import Panel, draw_tradeoff
from sylva_ray.reports.pages.run import page_environment

DESCRIPTIONS = {
    "tradeoff": "Benign against robust accuracy of every method",
    "bytes": "Benign and robust accuracy of every method against its upload",
}


@dataclass(frozen=True)
class Cell:
    """Text, a second line in small print, the marks of failed checks."""

    text: str
    small: str = ""
    marks: str = ""


@dataclass(frozen=True)
class TableColumn:
    """Columns of one group stand side by side under its name."""

    group: str
    heading: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Page:
    """What the page says, as plain text. ``names``, ``muted`` (a reference) and ``warned`` have an entry per row."""

    subtitle: str
    attack: str
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
    """The HTML file: self-contained, light and dark."""
    groups: list[tuple[str, int]] = []
    for column in page.columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = column.group, groups[-1][1] + 1
        else:
            groups.append((column.group, 1))
    figures = {
        name: Markup(svg(draw_tradeoff(panels), name, DESCRIPTIONS[name])) for name, panels in page.panels.items()
    }
    template = page_environment().get_template("compare.html.jinja")
    return template.render(page=page, groups=groups, figures=figures, light=LIGHT, dark=DARK)

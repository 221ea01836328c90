"""Comparison of runs: ``sylva-ray compare``, and the same as functions on loaded summaries.

::

    rows = compare([json.loads(path.read_text()) for path in paths])
    print(markdown(rows))
    plot(rows, Path("tradeoff.png"))

The modules, in the order of the data flow::

    runs.py ──► rows.py ──► verdicts.py ──► tables.py ──► files.py
    (checked)   (means over  (dominance,    (text, page,  (written)
                 seeds)       warnings)      plots)
"""

from sylva_ray.reports.compare.rows import Row, compare
from sylva_ray.reports.compare.tables import (
    columns,
    csv_text,
    markdown,
    markdown_table,
    page,
    plot,
    remarks,
    terminal_tables,
)
from sylva_ray.reports.compare.verdicts import (
    dominance,
    footnotes,
    notes,
    sentences,
    strongest_attack,
    warnings,
)

__all__ = [
    "Row",
    "columns",
    "compare",
    "csv_text",
    "dominance",
    "footnotes",
    "markdown",
    "markdown_table",
    "notes",
    "page",
    "plot",
    "remarks",
    "sentences",
    "strongest_attack",
    "terminal_tables",
    "warnings",
]

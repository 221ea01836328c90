"""Which row is which: for every row its letter, method and runs, and the settings in which the rows differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sylva_ray.reports.compare.rows import Row, differing_keys, short_key, short_value
from sylva_ray.reports.compare.verdicts import method_rows

MAX_COLUMNS = 5
"""Settings that have a column each; more are written one after the other."""

MAX_RUNS = 3
"""Runs of a row that are named."""


@dataclass(frozen=True)
class LegendRow:
    """A row of the legend.

    Attributes:
        letter: of the row in tables and plots.
        method: its name, and its phase where it is not the last one.
        runs: names of its runs.
        values: of the settings that differ, in the order of `Legend.keys`; empty where the row has no such setting.
    """

    letter: str
    method: str
    runs: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Legend:
    """The legend of a comparison.

    Attributes:
        keys: settings that differ between the rows, each as short as it is unique.
        rows: one per row but the references.
    """

    keys: tuple[str, ...]
    rows: tuple[LegendRow, ...]

    @property
    def has_columns(self) -> bool:
        """Whether every setting fits in a column of its own."""
        return len(self.keys) <= MAX_COLUMNS

    def differences(self, row: LegendRow) -> str:
        """Return the settings of a row that differ from those of others, as ``key=value``."""
        return ", ".join(f"{key}={value}" for key, value in zip(self.keys, row.values, strict=True) if value)

    def lines(self) -> list[str]:
        """Return a line per row, for a terminal."""
        parts = [(f"{row.letter}  {row.method}", row.runs, self.differences(row)) for row in self.rows]
        return ["; ".join(filter(None, part)) for part in parts]


def legend(rows: Sequence[Row]) -> Legend:
    """Return the legend of a comparison."""
    methods = method_rows(rows)
    values = [{**row.settings, **row.fleet} for row in methods]
    keys = differing_keys(values)
    return Legend(
        tuple(map(short_key, keys)),
        tuple(
            LegendRow(
                row.letter,
                row.method + (", phase 1" if row.stage == "phase1" else ""),
                _runs(row.sources),
                tuple(short_value(key, own[key]) if key in own else "" for key in keys),
            )
            for row, own in zip(methods, values, strict=True)
        ),
    )


def _runs(sources: Sequence[str]) -> str:
    named = [source.rstrip("/").rpartition("/")[2] for source in sources if source]
    more = f" and {len(named) - MAX_RUNS} more" if len(named) > MAX_RUNS else ""
    return ", ".join(named[:MAX_RUNS]) + more

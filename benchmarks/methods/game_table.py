"""Write what `game.py` measured as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]

UNDER_ATTACK = {"benign": "benign", "robust": "PGD-20"}


def game_tables(found: Mapping[str, Rows]) -> str:
    """Return three tables: phase 2 by ranking, sampled against exact values, mixed against refined coalitions.

    Args:
        found: the content of ``game.json``; a part that was not measured has no table.
    """
    tables = (("rankings", _rankings), ("sampling", _sampling), ("surrogate", _surrogate))
    return "\n\n".join(table(found[part]) for part, table in tables if found[part])


def _rankings(rows: Rows) -> str:
    gains = [f"{name}{balanced}" for balanced in ("", ", balanced") for name in UNDER_ATTACK.values()]
    lines = [
        f"| ranking | alpha | epsilon | seeds | {' | '.join(gains)} | layers | strength | seconds | block "
        "evaluations |",
        "|---|---:|---:|---:|" + "---:|" * (len(gains) + 4),
    ]
    for (alpha, epsilon, ranking), own in _groups(rows, "alpha", "epsilon", "ranking"):
        cells = [
            _points([row[f"{name}_{kind}"] - row[f"before_{name}_{kind}"] for row in own])
            for kind in ("accuracy", "balanced_accuracy")
            for name in UNDER_ATTACK
        ]
        cells += [f"{np.mean([row[key] for row in own]):.1f}" for key in ("layers", "strength")]
        cells += [f"{np.mean([row[key] for row in own]):,.0f}" for key in ("seconds", "block_evaluations")]
        lines.append(f"| {ranking} | {alpha} | {epsilon} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sampling(rows: Rows) -> str:
    lines = [
        "| pairs of permutations | alpha | epsilon | coalitions | largest error, of the largest value: median, worst "
        "| same candidates |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for (alpha, epsilon, pairs), own in _groups(rows, "alpha", "epsilon", "pairs"):
        errors = [row["largest_error"] for row in own]
        coalitions = np.mean([row["coalitions"] for row in own])
        same = f"{sum(row['same_candidates'] for row in own)} of {len(own)}"
        error = f"{np.median(errors):.2f}, {max(errors):.2f}"
        lines.append(f"| {pairs} | {alpha} | {epsilon} | {coalitions:.0f} | {error} | {same} |")
    return "\n".join(lines)


def _surrogate(rows: Rows) -> str:
    lines = [
        "| value | alpha | epsilon | Spearman's correlation: mean, lowest, highest | clients |",
        "|---|---:|---:|---:|---:|",
    ]
    for (alpha, epsilon), own in _groups(rows, "alpha", "epsilon"):
        for name in ("benign", "robust", "both"):
            values = [row[name] for row in own if np.isfinite(row[name])]
            spread = f"{np.mean(values):.2f}, {min(values):.2f}, {max(values):.2f}"
            lines.append(f"| {name} | {alpha} | {epsilon} | {spread} | {len(values)} |")
    return "\n".join(lines)


def _groups(rows: Rows, *keys: str) -> list[tuple[tuple[Any, ...], Rows]]:
    """Return the rows by their values of some keys; values in the order in which they come first."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def _points(values: Sequence[float]) -> str:
    """Return the mean of differences in points, and its standard deviation over seeds where there are several."""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):+.1f}{spread}"

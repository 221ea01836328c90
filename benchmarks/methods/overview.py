"""The ledger in one table: in every regime, which methods are better than Sylva in both accuracies.

Accuracies are benign and under the strongest attack, means over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ledger import run_name
from own_shares import constant_accuracies, own_accuracies

from sylva_ray.reports.compare import Row
from sylva_ray.reports.compare.verdicts import balanced_accuracies, method_rows, strongest_attack

SHOWN = 3
"""Names of methods in a cell; more are counted."""

Pair = tuple[float, float]
"""Benign and robust accuracy, fractions."""

HEADER = (
    "| regime | Sylva | better in both | better in both in the worst client | S14 passes | Sylva, own shares | "
    "constant answer, own shares | better in both, own shares |\n"
    "|---|---:|---|---|---:|---:|---:|---|"
)
"""Of `overview_line`."""


def overview_line(title: str, results: Path, regime: str, rows: Sequence[Row], reference: str, plain: str) -> str:
    """Write the line of a regime; see `HEADER`.

    Args:
        title: of the regime, in Markdown.
        results: the folder of the results of all regimes.
        regime: its folder in there.
        rows: of the comparison of its results.
        reference: the method that the others are compared with.
        plain: the same with the plain loss; it may be missing.
    """
    attack = strongest_attack(rows)
    final = {row.name: row for row in method_rows(rows) if row.stage == "final"}
    if attack is None or reference not in final:
        return f"| {title} | not all runs have finished |" + " |" * 6

    folders = {name: [results / run_name(name, regime, seed) for seed in row.seeds] for name, row in final.items()}
    constant = np.mean([constant_accuracies(folder).mean() for folder in folders[reference]])
    mean, worst = (_equal_shares(final, attack, statistic) for statistic in ("mean", "worst_decile"))
    own = {name: (_own_shares(paths, "benign"), _own_shares(paths, attack)) for name, paths in folders.items()}
    passing = sum("S14" not in row.failed for row in final.values())
    cells = [
        title,
        _percent(mean[reference]),
        _better(mean, reference),
        _better(worst, reference),
        f"{passing} of {len(final)}",
        "; plain loss: ".join(_percent(own[name]) for name in (reference, plain) if name in own),
        f"{100 * constant:.1f}",
        "; plain loss: ".join(_better(own, name) for name in (reference, plain) if name in own),
    ]
    return f"| {' | '.join(cells)} |"


def _equal_shares(rows: Mapping[str, Row], attack: str, statistic: str) -> dict[str, Pair]:
    """Return the class-balanced accuracies of a statistic over the clients."""
    found = {name: balanced_accuracies(row, attack, statistic) for name, row in rows.items()}
    return {name: (benign.mean, robust.mean) for name, pair in found.items() if pair for benign, robust in [pair]}


def _own_shares(folders: Sequence[Path], condition: str) -> float:
    """Return the mean of clients and seeds with the clients' own class shares."""
    return float(np.mean([own_accuracies(folder, condition).mean() for folder in folders]))


def _better(accuracies: Mapping[str, Pair], reference: str) -> str:
    """Name the methods that are at least as good as the reference in both accuracies and better in one, best first."""
    own = accuracies[reference]
    better = [name for name, pair in accuracies.items() if pair != own and min(np.subtract(pair, own)) >= 0]
    better.sort(key=lambda name: -sum(accuracies[name]))
    more = [f"{len(better) - SHOWN} more"] if len(better) > SHOWN else []
    return ", ".join([f"`{name}`" for name in better[:SHOWN]] + more) or "nobody"


def _percent(pair: Pair) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in pair)

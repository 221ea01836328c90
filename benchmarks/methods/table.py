"""Write the ledger's page from README.template.md: tables, figures, who dominates whom, and what the search chose.

    python benchmarks/methods/table.py

Everything comes from results/, search.json and game.json.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from textwrap import TextWrapper

import numpy as np
from claim import STATISTICS, Difference, differences
from game_table import game_tables
from ledger import HERE, RESULT, Ledger, run_name
from overview import HEADER, overview_line
from own_shares import own_shares_table

from sylva_ray.metrics.predictions import read_correct, read_labels
from sylva_ray.reports.compare import Row, compare
from sylva_ray.reports.compare.runs import Run
from sylva_ray.reports.compare.tables import markdown_table, plot
from sylva_ray.reports.compare.verdicts import footnotes, method_rows, notes, sentences, strongest_attack, warnings
from sylva_ray.storage.run_folder import RunFolder

REFERENCE, PLAIN = "sylva", "sylva_plain_loss"
NOT_FINISHED = "Not all runs of this regime have finished."
MARKER = re.compile(r"<!-- (\w+) ?([\w./-]*) -->")
"""A place in the template: what to insert, and of what (see `Results.named`)."""


@dataclass(frozen=True)
class Results:
    """The results of a ledger in one of its regimes; ``regime`` is empty in a ledger without regimes."""

    ledger: Ledger
    regime: str

    @classmethod
    def named(cls, name: str) -> Results:
        """Return what a marker names: ``REGIME`` of this ledger, ``LEDGER`` without regimes, or ``LEDGER/REGIME``."""
        first, _, rest = name.partition("/")
        ledger, regime = (Ledger(HERE / first), rest) if (HERE / first / "shared.yaml").exists() else (Ledger(), name)
        if regime not in ledger.regimes:
            raise SystemExit(f"README.template.md: {name!r} names no regime of a ledger")
        return cls(ledger, regime)

    @property
    def folder(self) -> Path:
        """Where the results of all regimes are."""
        folder: Path = self.ledger.folder / "results"
        return folder

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the comparison; none if there are no results yet."""
        return load_rows(self.ledger, self.regime)


def main() -> None:
    """Write README.md, and one figure per regime."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    named = cache(Results.named)

    def part(place: re.Match[str]) -> str:
        kind, name = place.groups()
        if kind in SINGLE_PARTS:
            return SINGLE_PARTS[kind]()
        results = named(name)
        return PARTS[kind](results) if results.rows else "No run of this regime has finished yet."

    template = (HERE / "README.template.md").read_text()
    (HERE / "README.md").write_text(MARKER.sub(part, template))


def load_rows(ledger: Ledger, regime: str) -> list[Row]:
    """Return the rows of a regime's comparison; none if it has no results yet.

    Results of a seed count once all methods that have results have one of it: some partitions are harder than others.
    """
    paths = sorted((ledger.folder / "results" / regime).glob(f"*/{RESULT}"))
    seeds: dict[str, set[str]] = {}
    for path in paths:
        method, _, seed = path.parent.name.rpartition("-")
        seeds.setdefault(method, set()).add(seed)
    common = set.intersection(*seeds.values()) if seeds else set()
    counted = [path for path in paths if path.parent.name.rpartition("-")[2] in common]
    results = [Run.from_json(json.loads(path.read_text()), str(path)) for path in counted]
    return compare(results) if results else []


# -- the claim -------------------------------------------------------------------------------------------


def compare_images(results: Results) -> dict[str, dict[str, Difference]]:
    """Compare all methods that have the reference's seeds with it, image by image; nothing without the reference."""
    final = {row.name: row for row in method_rows(results.rows) if row.stage == "final"}
    attack = strongest_attack(results.rows)
    if REFERENCE not in final or attack is None:
        return {}
    seeds = final[REFERENCE].seeds
    folders = {
        name: [RunFolder(results.folder / run_name(name, results.regime, seed)) for seed in seeds]
        for name, row in final.items()
        if row.seeds == seeds
    }
    correct = {
        name: [
            [np.stack(pair) for pair in zip(read_correct(folder, "benign"), read_correct(folder, attack), strict=True)]
            for folder in of_method
        ]
        for name, of_method in folders.items()
    }
    labels = [read_labels(folder) for folder in folders[REFERENCE]]
    found: dict[str, dict[str, Difference]] = differences(correct, labels, REFERENCE, np.random.default_rng(0))
    return found


def claim_table(claim: Mapping[str, Mapping[str, Difference]]) -> str:
    """Write every method minus Sylva, in points, with 90 % intervals."""
    if not claim:
        return NOT_FINISHED
    lines = [
        f"| minus {REFERENCE}, points | statistic | benign | robust | better in both, share of resamples |",
        "|---|---|---|---|---:|",
    ]
    for method, of_method in claim.items():
        for statistic in STATISTICS:
            d = of_method[statistic]
            cells = [
                f"{100 * at:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for at, low, high in (d.benign, d.robust)
            ]
            share = f"**{d.dominates:.2f}**" if d.is_ahead else f"{d.dominates:.2f}"
            lines.append(f"| {method} | {statistic} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def equal_bytes(rows: Sequence[Row]) -> str:
    """Say which methods that send no more bytes than Sylva in a run are not dominated among themselves."""
    final = {row.name: row for row in method_rows(rows) if row.stage == "final"}
    attack = strongest_attack(rows)
    if REFERENCE not in final or attack is None:
        return NOT_FINISHED
    limit = final[REFERENCE].total_bytes
    assert limit is not None, "every run counts its bytes"
    cheap = {name: row for name, row in final.items() if row.total_bytes and row.total_bytes.mean <= limit.mean}
    texts = []
    for statistic in ("mean", "worst_decile"):
        at = {
            name: tuple(
                value.mean
                for condition in ("benign", attack)
                if (value := row.value(condition, "balanced_accuracy", statistic)) is not None
            )
            for name, row in cheap.items()
        }
        front = [
            name
            for name, own in at.items()
            if not any(o != own and min(b - a for a, b in zip(own, o, strict=True)) >= 0 for o in at.values())
        ]
        texts.append(f"{statistic.replace('_', ' ')}: {', '.join(sorted(front))}")
    return bullets(texts)


# -- texts -----------------------------------------------------------------------------------------------


def bullets(lines: Sequence[str]) -> str:
    """Write a Markdown list, in lines of at most 120 characters."""
    items = TextWrapper(120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(items.fill(f"* {line}") for line in lines)


def search_table(ledger: Ledger) -> str:
    """Write every candidate with its two accuracies, the chosen one in bold."""
    lines = ["| method | candidates: class-balanced benign + PGD-5 accuracy on held-out images, % |", "|---|---|"]
    for method, result in ledger.searched().items():
        cells, chosen = [], ledger.chosen(method)
        for candidate in result.candidates:
            changes = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in candidate.changes.items())
            text = f"{changes}: {100 * candidate.benign_balanced:.1f} + {100 * candidate.robust_balanced:.1f}"
            cells.append(f"**{text}**" if candidate.changes == chosen else text)
        lines.append(f"| {method} | {'; '.join(cells)} |")
    return "\n".join(lines)


def figure(results: Results) -> str:
    """Draw the figure of a regime, and name it."""
    path = results.ledger.folder / f"{results.regime or 'figure'}.png"
    plot(results.rows, path)
    return f"![benign against robust accuracy, larger markers upload more]({path.relative_to(HERE)})"


PARTS: dict[str, Callable[[Results], str]] = {
    "TABLE": lambda results: markdown_table(results.rows),
    "FIGURE": figure,
    "VERDICTS": lambda results: bullets([*sentences(results.rows), *warnings(results.rows)]),
    "FOOTNOTES": lambda results: bullets([*footnotes(results.rows), *notes(results.rows)]),
    "CLAIM": lambda results: claim_table(compare_images(results)),
    "OWN_SHARES": lambda results: own_shares_table(results.folder, results.regime, results.rows),
    "BYTES": lambda results: equal_bytes(results.rows),
}
"""What a marker inserts of the results that it names."""

TITLES = {
    "robust-0.3-eps4": "[headline](#the-headline-robust-backbone-dirichlet-03-4255): robust backbone, Dirichlet 0.3",
    "robust-0.1-eps4": "[strong skew](#strong-skew-robust-backbone-dirichlet-01-4255): robust backbone, Dirichlet 0.1",
    "standard-0.3-eps4": "[standard backbone](#the-standard-backbone-dirichlet-03-4255), Dirichlet 0.3",
    "standard-0.1-eps4": "[hardest](#the-hardest-regime-standard-backbone-dirichlet-01-4255): standard, Dirichlet 0.1",
    "robust-0.3": "[2/255](#the-same-at-2255): robust backbone, Dirichlet 0.3",
}
"""The regimes in the order of the page, with the sections that describe them."""


def overview() -> str:
    """Write one line per regime.

    Raises:
        ValueError: a regime of the ledger has no title, or a title no regime.
    """
    if set(TITLES) != set(Ledger().regimes):
        raise ValueError(f"TITLES must name the regimes {Ledger().regimes}")
    shown = [(title, Results.named(regime)) for regime, title in TITLES.items()]
    lines = [overview_line(title, r.folder, r.regime, r.rows, REFERENCE, PLAIN) for title, r in shown]
    return "\n".join([HEADER, *lines])


SINGLE_PARTS: dict[str, Callable[[], str]] = {
    "OVERVIEW": overview,
    "SEARCH": lambda: search_table(Ledger()),
    "GAME": lambda: game_tables(json.loads((HERE / "game.json").read_text())),
}
"""What is there once."""


if __name__ == "__main__":
    main()

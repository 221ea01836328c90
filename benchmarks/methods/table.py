"""Write the ledger's page: tables, plots, dominance, bytes to target, what the search chose, and 4-bit against 32-bit.

    python benchmarks/methods/table.py [--runs runs/ledger]

Everything comes from results/*.json and search.json. Paired differences need the run folders, which hold every
prediction; they are kept in paired.json, so that the page can be written without the folders.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import TextWrapper

import numpy as np
from run import SearchResult, load_search

from sylva_ray.core.records import StageRecord
from sylva_ray.metrics.predictions import paired_difference, read_correct
from sylva_ray.reports.compare import compare
from sylva_ray.reports.compare.runs import Run
from sylva_ray.reports.compare.tables import markdown_table, plot
from sylva_ray.reports.compare.verdicts import footnotes, notes, sentences, warnings
from sylva_ray.reports.traffic import bytes_to_target, reference_targets
from sylva_ray.storage.run_folder import RunFolder

HERE = Path(__file__).parent
MARGIN = 0.02
"""Accuracy that quantised adapters may lose and still count as not inferior."""

PAIRS = (
    ("sylva_int4", "sylva"),
    *(("sylva", other) for other in ("per_lora", "fedavg_at_ft", "sylva_paper_like", "lorica", "undefended")),
)
"""Methods of three seeds that are compared image by image."""


class Result(Run):
    """A row of the ledger: the summary of a run, and of its records what bytes-to-target needs."""

    records: list[StageRecord]


def load_result(path: Path) -> Result:
    """Read a file in results/."""
    raw = json.loads(path.read_text())
    raw["records"] = [{"step": record["round"], "participants": []} | record for record in raw["records"]]
    return Result.from_json(raw, str(path))


def main() -> None:
    """Write README.md, ledger.png and bytes.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ledger"), help="run folders, for predictions")
    arguments = parser.parse_args()
    results = [load_result(path) for path in sorted((HERE / "results").glob("*.json"))]
    rows = compare(results)
    differences = paired(arguments.runs)
    plot(rows, HERE / "ledger.png")
    plot(rows, HERE / "bytes.png", kind="bytes")
    parts = {
        "TABLE": markdown_table(rows),
        "VERDICTS": bullets([*sentences(rows), *warnings(rows)]),
        "FOOTNOTES": bullets([*footnotes(rows), *notes(rows)]),
        "TARGET": to_target(results),
        "SEARCH": search_table(load_search()),
        "QUANTISED": noninferiority(differences["sylva_int4 - sylva"]),
        "PAIRED": against(differences),
    }
    text = (HERE / "README.template.md").read_text()
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    (HERE / "README.md").write_text(text)
    print(parts["TABLE"])


def bullets(lines: Sequence[str]) -> str:
    """Write a Markdown list, in lines of at most 120 characters."""
    items = TextWrapper(120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(items.fill(f"* {line}") for line in lines)


def to_target(results: Sequence[Result]) -> str:
    """Write the bytes until benign and robust balanced accuracy both reach 0.9 of FedAvg-AT's best (seed 0)."""
    by_method = {result.label: result for result in results if result.seed == 0}
    reference = by_method["fedavg_at"]
    attack = reference.attacks[0]
    paths = [f"{condition}.balanced_accuracy" for condition in ("benign", attack)]
    targets = reference_targets([reference.records], paths)
    lines = ["| method | bytes to target | fedavg_at / this |", "|---|---|---|"]
    needed = {method: bytes_to_target(result.records, targets) for method, result in sorted(by_method.items())}
    full = needed["fedavg_at"]
    for method, count in needed.items():
        total = sum(record.upload_bytes + record.download_bytes for record in by_method[method].records)
        shown = f"{count / 1e6:,.1f} MB" if count is not None else f"> {total / 1e6:,.1f} MB (not reached)"
        ratio = f"{full / count:,.0f}x" if count and full else ("0 bytes" if count == 0 else "")
        lines.append(f"| {method} | {shown} | {ratio} |")
    stated = ", ".join(f"{condition} {100 * value:.1f} %" for condition, value in targets.items())
    return f"Targets (class-balanced, moving mean of 3 evaluations):\n{stated}.\n\n" + "\n".join(lines)


def search_table(found: Mapping[str, SearchResult]) -> str:
    """Write every candidate with its two accuracies, the chosen one in bold."""
    lines = ["| method | candidates: class-balanced benign + PGD-10 accuracy on held-out images, % |", "|---|---|"]
    for method, result in found.items():
        cells = []
        for candidate in result.candidates:
            changes = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in candidate.changes.items())
            text = f"{changes}: {100 * candidate.benign_balanced:.1f} + {100 * candidate.robust_balanced:.1f}"
            cells.append(f"**{text}**" if candidate.changes == result.chosen else text)
        lines.append(f"| {method} | {'; '.join(cells)} |")
    return "\n".join(lines)


def paired(runs: Path) -> dict[str, dict[str, list[float]]]:
    """Compare `PAIRS`, or read paired.json for those without run folders.

    Returns:
        ``{"A - B": {condition: [difference, low, high]}}``.
    """
    path = HERE / "paired.json"
    found: dict[str, dict[str, list[float]]] = json.loads(path.read_text()) if path.exists() else {}
    for first, second in PAIRS:
        folders = [[RunFolder(runs / f"{name}-{seed}") for seed in range(3)] for name in (first, second)]
        if not all(folder.predictions_file.exists() for seeds in folders for folder in seeds):
            continue
        summary = folders[0][0].load_summary()
        assert summary is not None, "a run with predictions has finished"
        rng = np.random.default_rng(0)
        found[f"{first} - {second}"] = {
            condition: list(paired_difference(*correct_of(folders, condition), rng, confidence=0.9))
            for condition in ("benign", *summary.final.robust_accuracy)
        }
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


Correct = list[list[np.ndarray]]
"""Of a method, which images are classified correctly, by seed and client."""


def correct_of(folders: Sequence[Sequence[RunFolder]], condition: str) -> tuple[Correct, Correct]:
    """Return which images each of the two methods classifies correctly."""
    first, second = ([read_correct(folder, condition) for folder in seeds] for seeds in folders)
    return first, second


def noninferiority(found: dict[str, list[float]]) -> str:
    """Write the difference of Sylva with 4-bit updates and Sylva."""
    lines = ["| condition | 4-bit minus 32-bit, points | 95 % lower bound | within 2 points |", "|---|---|---|---|"]
    for condition, (difference, low, _) in found.items():
        verdict = "yes" if low > -MARGIN else "not shown"
        lines.append(f"| {condition} | {100 * difference:+.1f} | {100 * low:+.1f} | {verdict} |")
    return "\n".join(lines)


def against(found: dict[str, dict[str, list[float]]]) -> str:
    """Write the difference of Sylva and each other method of three seeds, with its 90 % interval."""
    rows = {name.removeprefix("sylva - "): row for name, row in found.items() if name.startswith("sylva - ")}
    conditions = list(next(iter(rows.values())))
    lines = [f"| sylva minus | {' | '.join(conditions)} |", f"|---|{'---|' * len(conditions)}"]
    for name, row in rows.items():
        cells = [f"{100 * d:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for d, low, high in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

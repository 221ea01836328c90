"""The ledger's README: table, plots, who dominates whom, bytes to target, what the search chose, and 4-bit against 32-bit.

    python benchmarks/methods/table.py [--runs runs/ledger]

Everything comes from results/*.json and search.json; the non-inferiority of 4-bit updates needs the run folders, which hold
every prediction, and is kept in noninferiority.json so that the table can be written without them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sylva_ray.evaluation.communication import bytes_to_target, targets_from
from sylva_ray.evaluation.comparison import compare, footnotes, markdown_table, notes, plot, sentences, warnings
from sylva_ray.evaluation.predictions import paired_difference, read_correct

HERE = Path(__file__).parent
MARGIN = 0.02
"""What quantised adapters may lose and still count as not inferior."""


def main() -> None:
    """Write README.md, ledger.png and bytes.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ledger"), help="run folders, for predictions")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    rows = compare(results)
    plot(rows, HERE / "ledger.png")
    plot(rows, HERE / "bytes.png", kind="bytes")
    parts = {
        "TABLE": markdown_table(rows),
        "VERDICTS": bullets([*sentences(rows), *warnings(rows)]),
        "FOOTNOTES": bullets([*footnotes(rows), *notes(rows)]),
        "TARGET": to_target(results),
        "SEARCH": search_table(json.loads((HERE / "search.json").read_text())),
        "QUANTISED": noninferiority(arguments.runs),
    }
    text = (HERE / "README.template.md").read_text()
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    (HERE / "README.md").write_text(text)
    print(parts["TABLE"])


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"* {line}" for line in lines)


def to_target(results: Sequence[dict[str, Any]]) -> str:
    """Bytes until benign and robust balanced accuracy both reach 0.9 of what FedAvg-AT reached at its best (seed 0)."""
    by_method = {row["method"]: row for row in results if row["seed"] == 0}
    reference = by_method["fedavg_at"]
    attack = next(iter(reference["final"]["robust_accuracy"]))
    paths = [f"{condition}.balanced_accuracy" for condition in ("benign", attack)]
    targets = targets_from([reference["records"]], paths)
    lines = ["| method | bytes to target | fedavg_at / this |", "|---|---|---|"]
    needed = {method: bytes_to_target(row["records"], targets) for method, row in sorted(by_method.items())}
    full = needed["fedavg_at"]
    for method, count in needed.items():
        total = sum(r["upload_bytes"] + r["download_bytes"] for r in by_method[method]["records"])
        shown = f"{count / 1e6:,.1f} MB" if count is not None else f"> {total / 1e6:,.1f} MB (not reached)"
        ratio = f"{full / count:,.0f}x" if count and full else ("0 bytes" if count == 0 else "")
        lines.append(f"| {method} | {shown} | {ratio} |")
    stated = ", ".join(f"{condition} {100 * value:.1f} %" for condition, value in targets.items())
    return f"Targets (class-balanced, moving mean of 3 evaluations): {stated}.\n\n" + "\n".join(lines)


def search_table(found: dict[str, Any]) -> str:
    """Every candidate with its two accuracies; the chosen one in bold."""
    lines = ["| method | candidates: class-balanced benign + PGD-10 accuracy on held-out images, % |", "|---|---|"]
    for method, entry in found.items():
        cells = []
        for row in entry["candidates"]:
            changes = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row["changes"].items())
            text = f"{changes}: {100 * row['benign_balanced']:.1f} + {100 * row['robust_balanced']:.1f}"
            cells.append(f"**{text}**" if row["changes"] == entry["chosen"] else text)
        lines.append(f"| {method} | {'; '.join(cells)} |")
    return "\n".join(lines)


def noninferiority(runs: Path) -> str:
    """Sylva with 4-bit updates against Sylva: paired bootstrap over images and seeds."""
    kept = HERE / "noninferiority.json"
    seeds = range(3)
    folders = {name: [runs / f"{name}-{seed}" for seed in seeds] for name in ("sylva", "sylva_int4")}
    if all((folder / "predictions.safetensors").exists() for own in folders.values() for folder in own):
        labels = json.loads((folders["sylva"][0] / "summary.json").read_text())["final"]["robust_accuracy"]
        rng = np.random.default_rng(0)
        found = {}
        for condition in ("benign", *labels):
            first, second = ([read_correct(f, condition) for f in folders[n]] for n in ("sylva_int4", "sylva"))
            found[condition] = paired_difference(first, second, rng, confidence=0.9)
        kept.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(kept.read_text())
    lines = ["| condition | 4-bit minus 32-bit, points | 95 % lower bound | within 2 points |", "|---|---|---|---|"]
    for condition, (difference, low, _) in found.items():
        verdict = "yes" if low > -MARGIN else "not shown"
        lines.append(f"| {condition} | {100 * difference:+.1f} | {100 * low:+.1f} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""The ledger's README: table, plots, who dominates whom, bytes to target, what the search chose, and 4-bit against 32-bit.

    python benchmarks/methods/table.py [--runs runs/ledger]

Everything comes from results/*.json and search.json; paired differences need the run folders, which hold every prediction,
and are kept in paired.json so that the page can be written without them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sylva_ray.core.records import StageRecord
from sylva_ray.metrics.predictions import paired_difference, read_correct
from sylva_ray.reports.compare import compare
from sylva_ray.reports.compare.tables import markdown_table, plot
from sylva_ray.reports.compare.verdicts import footnotes, notes, sentences, warnings
from sylva_ray.reports.traffic import bytes_to_target, reference_targets
from sylva_ray.storage.run_folder import RunFolder

HERE = Path(__file__).parent
MARGIN = 0.02
"""What quantised adapters may lose and still count as not inferior."""

PAIRS = (
    ("sylva_int4", "sylva"),
    *(("sylva", other) for other in ("per_lora", "fedavg_at_ft", "sylva_paper_like", "lorica", "undefended")),
)
"""Methods of three seeds that are compared image by image."""


def main() -> None:
    """Write README.md, ledger.png and bytes.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ledger"), help="run folders, for predictions")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    rows = compare(results)
    differences = paired(arguments.runs)
    plot(rows, HERE / "ledger.png")
    plot(rows, HERE / "bytes.png", kind="bytes")
    parts = {
        "TABLE": markdown_table(rows),
        "VERDICTS": bullets([*sentences(rows), *warnings(rows)]),
        "FOOTNOTES": bullets([*footnotes(rows), *notes(rows)]),
        "TARGET": to_target(results),
        "SEARCH": search_table(json.loads((HERE / "search.json").read_text())),
        "QUANTISED": noninferiority(differences["sylva_int4 - sylva"]),
        "PAIRED": against(differences),
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
    """Tabulate the bytes until benign and robust balanced accuracy reach 0.9 of FedAvg-AT's best, for seed 0."""
    by_method = {row["method"]: row for row in results if row["seed"] == 0}
    records = {method: stage_records(row) for method, row in sorted(by_method.items())}
    attack = next(iter(by_method["fedavg_at"]["final"]["robust_accuracy"]))
    paths = [f"{condition}.balanced_accuracy" for condition in ("benign", attack)]
    targets = reference_targets([records["fedavg_at"]], paths)
    lines = ["| method | bytes to target | fedavg_at / this |", "|---|---|---|"]
    needed = {method: bytes_to_target(of_method, targets) for method, of_method in records.items()}
    full = needed["fedavg_at"]
    for method, count in needed.items():
        total = sum(record.upload_bytes + record.download_bytes for record in records[method])
        shown = f"{count / 1e6:,.1f} MB" if count is not None else f"> {total / 1e6:,.1f} MB (not reached)"
        ratio = f"{full / count:,.0f}x" if count and full else ("0 bytes" if count == 0 else "")
        lines.append(f"| {method} | {shown} | {ratio} |")
    stated = ", ".join(f"{condition} {100 * value:.1f} %" for condition, value in targets.items())
    return f"Targets (class-balanced, moving mean of 3 evaluations): {stated}.\n\n" + "\n".join(lines)


def stage_records(result: dict[str, Any]) -> list[StageRecord]:
    """Return the records of a result, which are kept without their step and participants."""
    records = ({"step": record["round"], "participants": [], **record} for record in result["records"])
    return [StageRecord.from_json(record, f"{result['method']}-{result['seed']}") for record in records]


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


def paired(runs: Path) -> dict[str, dict[str, list[float]]]:
    """``{"A - B": {condition: [difference, low, high]}}`` of `PAIRS`; from paired.json where the run folders are not at hand."""
    kept = HERE / "paired.json"
    found: dict[str, dict[str, list[float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    for first, second in PAIRS:
        folders = [[runs / f"{name}-{seed}" for seed in range(3)] for name in (first, second)]
        if not all((folder / "predictions.safetensors").exists() for own in folders for folder in own):
            continue
        attacks = json.loads((folders[0][0] / "summary.json").read_text())["final"]["robust_accuracy"]
        rng = np.random.default_rng(0)
        found[f"{first} - {second}"] = {
            condition: list(paired_difference(*right_of(folders, condition), rng, confidence=0.9))
            for condition in ("benign", *attacks)
        }
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return found


def right_of(folders: list[list[Path]], condition: str) -> tuple[Any, Any]:
    """Which images each of the two methods got right, seed by seed."""
    first, second = ([read_correct(RunFolder(folder), condition) for folder in own] for own in folders)
    return first, second


def noninferiority(found: dict[str, list[float]]) -> str:
    """Sylva with 4-bit updates against Sylva."""
    lines = ["| condition | 4-bit minus 32-bit, points | 95 % lower bound | within 2 points |", "|---|---|---|---|"]
    for condition, (difference, low, _) in found.items():
        verdict = "yes" if low > -MARGIN else "not shown"
        lines.append(f"| {condition} | {100 * difference:+.1f} | {100 * low:+.1f} | {verdict} |")
    return "\n".join(lines)


def against(found: dict[str, dict[str, list[float]]]) -> str:
    """Sylva minus each of the others of three seeds, with its 90 % interval."""
    rows = {name.removeprefix("sylva - "): own for name, own in found.items() if name.startswith("sylva - ")}
    conditions = list(next(iter(rows.values())))
    lines = [f"| sylva minus | {' | '.join(conditions)} |", f"|---|{'---|' * len(conditions)}"]
    for name, own in rows.items():
        cells = [f"{100 * d:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for d, low, high in own.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""The accuracy table on real CIFAR-10: every row is one `sylva-ray run` of configs/cifar10.yaml with another method.

    python benchmarks/cifar10_table.py [KEY=VALUE ...] --out runs/cifar10_table

Same data, same clients, same number of local epochs, same evaluation. Runs that are complete are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = ("undefended", "per_lora", "sylva")
STATISTICS = ("mean", "worst_decile")


def run(method: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    """One method's summary, from an earlier run or a new one."""
    folder = out / method
    if not (folder / "summary.json").exists():
        command = [
            Path(sys.executable).with_name("sylva-ray"),
            "run",
            "configs/cifar10.yaml",
            f"algorithm.name={method}",
        ]
        resume = ["--resume"] if (folder / "config.yaml").exists() else []
        subprocess.run([*map(str, command), *overrides, "--out", str(folder), *resume], check=True)
    return json.loads((folder / "summary.json").read_text())


def row(name: str, accuracies: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """Benign, then each attack: mean / worst decile, plain and class-balanced."""
    cells = [name]
    for key in ("benign", *accuracies["robust_accuracy"]):
        for kind in ("accuracy", "balanced_accuracy"):
            spread = accuracies[f"benign_{kind}"] if key == "benign" else accuracies[f"robust_{kind}"][key]
            cells.append(" / ".join(f"{100 * spread[statistic]:.1f}" for statistic in STATISTICS))
    communication = summary["communication"]
    ratio = communication["full_model_ratio"]
    cells += [f"{communication['upload_bytes_per_client_round'] / 1e3:.0f}", f"{ratio:.0f}x" if ratio else "-"]
    return cells


def majority_row(summary: dict[str, Any]) -> list[str]:
    """Always answering the client's most frequent class: the same under every attack, balanced 1 / its classes."""
    plain = " / ".join(f"{100 * summary['majority'][statistic]:.1f}" for statistic in STATISTICS)
    conditions = 1 + len(summary["final"]["robust_accuracy"])
    return ["majority", *([plain, ""] * conditions), "0", "-"]


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    sylva = summaries["sylva"]
    header = ["method (mean / worst decile, %)"]
    for key in ("benign", *sylva["final"]["robust_accuracy"]):
        header += [key, f"{key}, balanced"]
    header += ["upload kB per client and round", "full model / upload"]
    rows = [majority_row(sylva)]
    rows += [row(method, summaries[method]["final"], summaries[method]) for method in METHODS if method != "sylva"]
    rows += [row("sylva, phase 1", sylva["phase1"], sylva), row("sylva, phase 2", sylva["final"], sylva)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Run what is missing, then print the table and write it beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_table"))
    arguments = parser.parse_args()
    summaries = {method: run(method, arguments.out, arguments.overrides) for method in METHODS}
    text = table(summaries)
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

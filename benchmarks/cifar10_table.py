"""Make the accuracy table on CIFAR-10: every row is a run of configs/cifar10.yaml with another method.

    python benchmarks/cifar10_table.py [KEY=VALUE ...] --out runs/cifar10_table

Data, clients, number of local epochs and evaluation are the same. Runs that are complete are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sylva_ray
from sylva_ray.core.summary import Spread, StageAccuracies, Summary
from sylva_ray.storage.run_folder import RunFolder

METHODS = ("undefended", "per_lora", "sylva")


def run(method: str, out: Path, overrides: list[str]) -> Summary:
    """Return the summary of one method, from an earlier run or a new one."""
    config = sylva_ray.load_config("configs/cifar10.yaml", [f"algorithm.name={method}", *overrides])
    folder = out / method
    if RunFolder(folder).config_file.exists():
        return sylva_ray.resume(folder, config=config)
    return sylva_ray.run(config, out=folder)


def row(name: str, accuracies: StageAccuracies, summary: Summary) -> list[str]:
    """Write the accuracies on benign images and under each attack, plain and class-balanced."""
    cells = [name, cell(accuracies.benign_accuracy), cell(accuracies.benign_balanced_accuracy)]
    for attack, spread in accuracies.robust_accuracy.items():
        cells += [cell(spread), cell(accuracies.robust_balanced_accuracy[attack])]
    ratio = summary.communication.full_model_ratio
    cells += [f"{summary.communication.upload_bytes_per_client_round / 1e3:.0f}", f"{ratio:.0f}x" if ratio else "-"]
    return cells


def cell(spread: Spread) -> str:
    """Write the mean and the worst decile in percent."""
    return f"{100 * spread.mean:.1f} / {100 * spread.worst_decile:.1f}"


def majority_row(summary: Summary) -> list[str]:
    """Write the accuracy of always answering the client's most frequent class, which is the same under every attack."""
    conditions = 1 + len(summary.final.robust_accuracy)
    return ["majority", *([cell(summary.majority), ""] * conditions), "0", "-"]


def table(summaries: dict[str, Summary]) -> str:
    """Write the table in Markdown."""
    sylva = summaries["sylva"]
    header = ["method (mean / worst decile, %)"]
    for key in ("benign", *sylva.final.robust_accuracy):
        header += [key, f"{key}, balanced"]
    header += ["upload kB per client and round", "full model / upload"]
    rows = [majority_row(sylva)]
    rows += [row(method, summaries[method].final, summaries[method]) for method in METHODS if method != "sylva"]
    assert sylva.phase1 is not None
    rows += [row("sylva, phase 1", sylva.phase1, sylva), row("sylva, phase 2", sylva.final, sylva)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Run what is missing, print the table and write it beside the runs."""
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

"""Show that an actor stays within its memory budget: ViT-B/16 at 224 px, both phases, on a CPU.

    python benchmarks/memory_budget.py [--budgets "4 GB" "8 GB"] [--together]
                                       [--out benchmarks/results/memory_budget.json]

Four clients with eight training images each run Sylva with random weights of ViT-B/16, in a process of its own per
budget, in which the pool is `in_process`, so that the process is the actor and the coordinator as well. Printed are the
windows that were planned, the highest resident memory, and the largest difference between the clients' adapters under
the first budget and under the others. With ``--together``, the budgets run at the same time, which takes their sum of
memory and makes the seconds those of processes that share the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import sylva_ray
from sylva_ray.core.sections import parse_size

CLIENTS = 4
SETTINGS = (
    "name=memory_budget",
    "backbone.name=vit_base_patch16_224",
    f"partition.num_clients={CLIENTS}",
    "partition.kind=iid",
    "partition.min_samples=10",
    "partition.test_samples=8",
    f"dataset.max_train={10 * CLIENTS}",
    f"dataset.max_test={8 * CLIENTS}",
    "training.batch_size=8",
    "training.rounds=1",
    "training.precision=float32",
    "training.attention=fused",
    f"training.cohort_size={CLIENTS}",
    "attack.steps=1",
    "evaluation.attacks=[{name: fgsm}]",
    "evaluation.checks=false",
    "evaluation.precision=float32",
    "algorithm.name=sylva",
    "algorithm.head_warmup_epochs=1",
    "algorithm.mixture.attack_steps=1",
    "algorithm.mixture.own_shares=[0.5]",
    "algorithm.phase2.benign_epochs=1",
    "algorithm.phase2.refine_epochs=1",
    "algorithm.phase2.strengths=[1.0]",
    "algorithm.phase2.attack_steps=1",
    "algorithm.phase2.sampled_pairs=4",
    "tracking.enabled=false",
    "cluster.pool=in_process",
)
"""Few steps of everything: the memory does not depend on their number. The game of 12 blocks is sampled, as phase 1 is
short."""


def one(budget: str, folder: Path, settings: list[str]) -> dict[str, object]:
    """Run the experiment under a budget in this process."""
    started = time.perf_counter()
    summary = sylva_ray.run(
        {"dataset": {"name": "digits"}},
        [*SETTINGS, f"cluster.memory_per_actor={budget}", *settings],
        out=folder,
        show="nothing",
    )
    config = sylva_ray.load_run(folder).config
    assert config.training.windows != "auto"
    return {
        "budget": parse_size(budget),
        "windows": config.training.windows.model_dump(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": round(time.perf_counter() - started),
        "exact": summary.layer_game is not None and summary.layer_game.exact,
        "sampled_because": summary.layer_game and summary.layer_game.sampled_because,
    }


def output_of(settings: list[str], budget: str, folder: Path) -> str:
    """Run `one` in a process of its own, and return what it prints."""
    command = [sys.executable, __file__, *settings, "--budgets", budget, "--one", str(folder)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Run every budget in a process of its own, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=["4 GB", "8 GB"])
    parser.add_argument("--together", action="store_true", help="run all budgets at the same time")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changes of the experiment")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.budgets[0], given.one, given.settings)))
        return
    rows, states = [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        runs = [Path(folder) / str(number) for number in range(len(given.budgets))]
        in_turn_or_together = threads.map if given.together else map
        outputs = in_turn_or_together(partial(output_of, given.settings), given.budgets, runs)
        for budget, run, output in zip(given.budgets, runs, outputs, strict=True):
            rows.append(json.loads(output.splitlines()[-1]))
            states.append(sylva_ray.load_run(run).states)
            row = rows[-1]
            print(
                f"{budget}: peak {row['peak'] / 1e9:.2f} GB, {row['peak'] / row['budget']:.2f} of the budget; "
                f"windows {row['windows']}; {row['seconds']} s; {row['sampled_because'] or 'all coalitions'}",
                flush=True,
            )
    difference = max(
        float(np.abs(value - other[client][name]).max())
        for other in states[1:]
        for client, state in enumerate(states[0])
        for name, value in state.items()
    )
    print(f"largest difference between the states under the first budget and the others: {difference:.2e}")
    if given.out:
        facts = {
            "command": shlex.join(["python", "benchmarks/memory_budget.py", *sys.argv[1:]]),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no GPU, {_processor()}",
            "version": sylva_ray.__version__,
            "runs": rows,
            "largest_difference": difference,
        }
        given.out.write_text(json.dumps(facts, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()

"""Measure the memory and speed of one actor by cohort size, for the table in docs/sizing.md.

    python benchmarks/sizing.py [--backbone NAME] [--cohorts 1 2 4 8] [--device cuda]

Every row is a process of its own that trains a cohort of clients for one epoch, two batches each. Memory is the most
that the process had, and what it had with the model loaded: resident memory on a CPU, allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from sylva_ray.config.experiment import DEFAULT_BACKBONE, load_config
from sylva_ray.preparation.experiment import create_worker

BATCH = 32


def one(backbone: str, cohort: int, device: str) -> dict[str, float]:
    """Measure one row in this process."""
    import torch

    from sylva_ray.core.seeding import generator
    from sylva_ray.core.types import stack_states
    from sylva_ray.federation.client.training import TrainSettings, TrainTask
    from sylva_ray.federation.client.worker import build_model
    from sylva_ray.preparation.experiment import prepare

    overrides = [f"partition.num_clients={cohort}", f"backbone.name={backbone}", f"training.device={device}"]
    overrides += [f"training.batch_size={BATCH}", "training.precision=float32", "attack.steps=3", "partition.kind=iid"]
    overrides += [f"training.cohort_size={cohort}", f"dataset.max_train={80 * cohort}", "cluster.pool=in_process"]
    prepared = prepare(load_config("configs/digits.yaml", overrides))
    config = prepared.config
    worker = create_worker(config, prepared.fleet, prepared.backbone)
    model = build_model(worker.algorithm, config, prepared.fleet.num_classes, prepared.backbone)
    state = model.initial_state(generator(0, "initial state"))
    task = TrainTask(
        1, tuple(range(cohort)), stack_states([state] * cohort), TrainSettings(epsilon=8 / 255, lr=0.01, epochs=1)
    )
    images = sum(len(client.train) for client in prepared.fleet.clients)

    def memory() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    before = memory()
    started = time.perf_counter()
    worker.run(task)
    seconds = time.perf_counter() - started
    return {"loaded": before, "peak": memory(), "per_second": images / seconds}


def main() -> None:
    """Measure every row in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.backbone, given.one, given.device)))
        return
    print(f"{given.backbone}, batch {BATCH} per client, {given.device}\n")
    print("| cohort | loaded, MB | peak, MB | MB per image in the batch | images per second |\n|---|---|---|---|---|")
    for cohort in given.cohorts:
        command = [
            sys.executable,
            __file__,
            "--backbone",
            given.backbone,
            "--device",
            given.device,
            "--one",
            str(cohort),
        ]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        slope = (row["peak"] - row["loaded"]) / (cohort * BATCH)
        print(
            f"| {cohort} | {row['loaded']:,.0f} | {row['peak']:,.0f} | {slope:.2f} | {row['per_second']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Measure the CPU seconds of one round of local training, all cohorts of a skewed fleet one after the other.

    python benchmarks/train_round.py [--clients 64] [--images 1400] [--batch-size 16] [--attack-steps 1]

To compare two commits, run it in turns in the two working trees and compare medians. Cohorts, batches, attack and
optimiser are those of a run; the exchange is left out. There is one thread, and one cohort runs before, to warm up.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import stack_states
from sylva_ray.federation.client.training import TrainSettings, TrainTask
from sylva_ray.federation.cohorts import make_cohorts
from sylva_ray.preparation.experiment import create_worker, prepare


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--images", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--attack-steps", type=int, default=1)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sections: dict[str, Any] = {
        "dataset": {"name": "digits", "max_train": given.images, "max_test": 200},
        "partition": {"num_clients": given.clients, "alpha": 0.5, "min_samples": 5, "test_samples": 1},
        "attack": {"epsilon": "4/255", "steps": given.attack_steps},
        "training": {
            "batch_size": given.batch_size,
            "cohort_size": 8,
            "precision": given.precision,
            "attention": {"float32": "fused", "bfloat16": "plain"},
            "device": "cpu",
        },
        "evaluation": {"precision": "float32"},
        "cluster": {"pool": "in_process"},
    }
    made = prepare(build(ExperimentConfig, sections), measure=False)
    worker = create_worker(made.config, made.fleet, made.backbone)
    state = worker.model.initial_state(generator(0, "initial state"))
    sizes = made.fleet.label_matrix().sum(1).tolist()
    tasks = [
        TrainTask(1, cohort, stack_states([state] * len(cohort)), TrainSettings(made.config.attack.epsilon, 1e-3))
        for cohort in make_cohorts(range(given.clients), sizes, 8)
    ]
    worker.run(tasks[0])
    started = time.process_time()
    for task in tasks:
        worker.run(task)
    seconds = time.process_time() - started
    steps = sum(-(-max(sizes[client] for client in task.clients) // given.batch_size) for task in tasks)
    print(f"{seconds:.2f} CPU s, {len(tasks)} cohorts, {steps} steps, {sum(sizes)} images, ", end="")
    print(f"{min(sizes)} to {max(sizes)} a client")


if __name__ == "__main__":
    main()

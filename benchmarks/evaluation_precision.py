"""Compare the robust accuracies that attacks in bfloat16 (successes confirmed in float32) and in float32 report.

    python benchmarks/evaluation_precision.py [--seeds 0 1 2] [--rounds 3]

For every seed, Sylva's phase 1 is trained on CIFAR-10 (configs/cifar10.yaml, 10 clients of 100 test images each). Then
each gradient attack runs on the same clients in both precisions; other attacks always compute in float32. Differences
are in points of robust accuracy, positive where bfloat16 reports more because its attack is weaker. Seconds are the
worker's CPU time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sylva_ray.config.attacks import parse_attack
from sylva_ray.config.experiment import load_config
from sylva_ray.core.types import AttackSpec, ClientState, stack_states
from sylva_ray.execution.run import run_prepared
from sylva_ray.federation.client.measuring import EvaluateTask
from sylva_ray.federation.observer import Observer
from sylva_ray.preparation.experiment import Prepared, create_worker, prepare
from sylva_ray.storage.run_folder import RunFolder

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10.yaml"
ATTACKS = (
    "pgd:epsilon=4/255,steps=20",
    "pgd:epsilon=8/255,steps=20",
    "cw:epsilon=4/255,steps=20",
    "apgd:epsilon=4/255,steps=20",
    "apgd:epsilon=4/255,steps=20,loss=targeted,targets=3",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    specs = [parse_attack(text) for text in ATTACKS]
    print(f"{'seed attack':36}{'float32':>9}{'bfloat16':>10}{'points':>8}{'CPU s':>8}{'CPU s':>8}{'ratio':>7}")
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            fixed = [
                "cluster.pool=in_process",
                "tracking.enabled=false",
                "evaluation.attacks=[]",
                "evaluation.checks=false",
            ]
            fixed += ["algorithm.phase2.enabled=false", f"seed={seed}", f"training.rounds={given.rounds}"]
            prepared = prepare(load_config(CONFIG, [*fixed, *given.overrides]))
            run_prepared(prepared, RunFolder(Path(folder) / "run"), False, Observer())
            states = RunFolder(Path(folder) / "run").load_states()
        for spec in specs:
            (exact, exact_s), (coarse, coarse_s) = (
                attacked(prepared, states, spec, p) for p in ("float32", "bfloat16")
            )
            row = f"{seed} {spec.label:34}{100 * exact:9.1f}{100 * coarse:10.1f}{100 * (coarse - exact):8.1f}"
            print(f"{row}{exact_s:8.1f}{coarse_s:8.1f}{coarse_s / exact_s:7.2f}", flush=True)


def attacked(
    prepared: Prepared, states: Sequence[ClientState], spec: AttackSpec, precision: str
) -> tuple[float, float]:
    """Return the robust accuracy over all clients' test images, and the CPU seconds."""
    evaluation = prepared.config.evaluation.model_copy(update={"precision": precision})
    config = prepared.config.model_copy(update={"evaluation": evaluation})
    worker = create_worker(config, prepared.fleet, prepared.backbone)
    size, correct = config.training.cohort_size, []
    started = time.process_time()
    for first in range(0, len(states), size):
        clients = tuple(range(first, min(first + size, len(states))))
        task = EvaluateTask(1, clients, stack_states([states[c] for c in clients]), (spec,))
        for client, outcome in zip(clients, worker.run(task).outcomes, strict=True):
            correct.append(outcome.predictions[spec.label] == prepared.fleet.test_labels(client))
    return float(np.concatenate(correct).mean()), time.process_time() - started


if __name__ == "__main__":
    main()

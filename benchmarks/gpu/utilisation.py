"""Part 7: how busy the device is in a real task: training, then evaluation, of unequal clients."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.lab import Experiment, Lab, Line
from benchmarks.gpu.rates import product_rate
from benchmarks.gpu.speed import task_of, training_flops
from sylva_ray.core.types import AttackSpec
from sylva_ray.federation.client.measuring import EvaluateTask


def utilisation(lab: Lab) -> Iterator[Line]:
    """Yield the busy fraction of the device by `nvidia-smi`, and the rate of products, of train and evaluate tasks."""
    backbone, counts, steps = (
        ("vit_micro", (4, 2), 1) if lab.reduced else ("vit_base_patch16_224", (64, 48, 40, 32), 10)
    )
    experiment = task_of(lab, backbone, "bfloat16", counts, steps)
    clients = tuple(range(len(counts)))
    attack = AttackSpec("pgd", 4 / 255, steps, 1 / 255)
    task = EvaluateTask(2, clients, experiment.stack(clients), (attack,))
    works: dict[str, tuple[Callable[[], object], float]] = {
        "train": (experiment.trained, sum(counts) * training_flops(experiment, steps)),
        "evaluate": (lambda: experiment.worker.run(task), len(counts) * 2 * training_flops(experiment, steps) / 2),
    }
    peak = product_rate(lab, torch.bfloat16)
    for name, (work, flops) in works.items():
        work()
        yield {"item": name, **_observed(lab, experiment, work, flops, peak)}


def _observed(lab: Lab, experiment: Experiment, work: Callable[[], object], flops: float, peak: float) -> Line:
    """Repeat some work for some seconds and observe the device."""
    del experiment
    sampler = _sampler() if lab.is_cuda else None
    runs, cpu, started = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - started < (0.2 if lab.reduced else 5):
        work()
        lab.synchronise()
        runs += 1
    elapsed = time.perf_counter() - started
    return {
        "seconds_per_task": round(elapsed / runs, 3),
        "of_product_rate": round(runs * flops / elapsed / peak, 3),
        "host_busy": round((time.process_time() - cpu) / elapsed, 2),
        "device_busy": _mean_busy(sampler),
    }


def _sampler() -> subprocess.Popen[str] | None:
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        return None


def _mean_busy(sampler: subprocess.Popen[str] | None) -> float | None:
    """End the sampler and return the mean of what it has seen, in [0, 1]; None where there is nothing."""
    if sampler is None:
        return None
    sampler.terminate()
    seen = [float(line) for line in sampler.communicate()[0].split() if line.replace(".", "").isdigit()]
    return round(sum(seen) / len(seen) / 100, 2) if seen else None

"""Part 5: images per second of real train tasks, against what the device's matrix products allow."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from benchmarks.gpu.lab import Experiment, Lab, Line
from benchmarks.gpu.rates import product_rate
from sylva_ray.core.precision import torch_dtype
from sylva_ray.federation.client import batches, optim
from sylva_ray.models.cohort import repeat_owner, to_parameters
from sylva_ray.models.flops import flop_counter

T = TypeVar("T")

WANTED = 0.5
"""The fraction of the rate of a matrix product that training ViT-B in bfloat16 must reach."""

CASES = (
    ("vit_base_patch16_224", "bfloat16", (32,) * 4),
    ("vit_base_patch16_224", "bfloat16", (32,)),
    ("vit_base_patch16_224", "float32", (32,) * 2),
    ("vit_small_patch16_224", "bfloat16", (32,) * 4),
    ("vit_small_patch16_224", "float32", (32,) * 4),
    ("vit_tiny_patch16_224", "bfloat16", (32,) * 8),
    ("vit_tiny_patch16_224", "float32", (32,) * 8),
)
"""Backbone, precision, and the images of every client in a step."""


def speed(lab: Lab) -> Iterator[Line]:
    """Yield the speed of every case, of a stack against its clients one by one, and of unequal clients."""
    peak = {name: product_rate(lab, torch_dtype(name)) for name in ("bfloat16", "float32")}
    steps = 1 if lab.reduced else 10
    rates: dict[tuple[str, str], float] = {}
    for backbone, precision, counts in (("vit_micro", "float32", (4, 4)),) if lab.reduced else CASES:
        line = trained(lab, backbone, precision, counts, steps)
        share = line["tflops"] * 1e12 / peak[precision]
        is_judged = lab.is_cuda and backbone.startswith("vit_base") and precision == "bfloat16" and len(counts) > 1
        rates[backbone, precision] = max(line["images_per_s"], rates.get((backbone, precision), 0.0))
        name = f"{backbone}, {precision}, C = {len(counts)} x {counts[0]}"
        yield {
            "item": name,
            **line,
            "of_product_rate": round(share, 3),
            "holds": share >= WANTED if is_judged else None,
        }
    for backbone in {backbone for backbone, _ in rates}:
        low, full = (rates.get((backbone, precision)) for precision in ("bfloat16", "float32"))
        if low and full:
            yield {
                "item": f"{backbone}, bfloat16 against float32",
                "ratio": round(low / full, 2),
                "attacks_in": "bfloat16" if low > 5 * full else "float32",
            }
    small = (
        ("vit_micro", (2, 2, 2, 2), (5, 1, 1, 1))
        if lab.reduced
        else ("vit_small_patch16_224", (16,) * 4, (40, 12, 8, 4))
    )
    yield {"item": "stack against one by one", **stacked(lab, small[0], small[1], steps)}
    equal, ragged = (trained(lab, small[0], "float32", counts, steps)["images_per_s"] for counts in small[1:])
    yield {"item": "unequal against equal clients", "ratio": round(ragged / equal, 2)}
    yield {"item": "where the time goes", **divided(lab, small[0], small[1], steps)}


def task_of(lab: Lab, backbone: str, precision: str, counts: Sequence[int], steps: int) -> Experiment:
    """Return an experiment whose train task is one step of PGD with ``steps`` steps, with ``counts`` images."""
    sections: dict[str, dict[str, Any]] = {
        "backbone": {"name": backbone},
        "lora": {"rank": 8},
        "attack": {"steps": steps},
        "training": {"batch_size": max(counts), "precision": precision},
    }
    return lab.experiment(counts, sections, image_size=32 if backbone == "vit_micro" else 224, held_out=1)


def trained(lab: Lab, backbone: str, precision: str, counts: Sequence[int], steps: int) -> Line:
    """Return the speed of a train task of three epochs, after one to warm up."""
    experiment = task_of(lab, backbone, precision, counts, steps)
    experiment.trained()
    epochs = 1 if lab.reduced else 3
    seconds = lab.seconds(lambda: experiment.trained(epochs=epochs))
    images = epochs * sum(counts)
    flops = images * training_flops(experiment, steps)
    return {
        "images_per_s": round(images / seconds, 1),
        "ms_per_step": round(1000 * seconds / epochs, 1),
        "tflops": round(flops / seconds / 1e12, 3),
    }


def training_flops(experiment: Experiment, steps: int) -> float:
    """Return the FLOPs of one image in a step of adversarial training.

    Forward and input gradient for every step of the attack, and once for the gradients of the adapters: frozen weights
    have none, and those of the adapters are small.
    """
    return 2 * (steps + 1) * forward_flops(experiment)


def forward_flops(experiment: Experiment) -> float:
    """Return the FLOPs of the matrix products of one image's forward pass, as torch counts them."""
    worker = experiment.worker
    size = worker.fleet.dataset.image_size
    params = to_parameters(experiment.stack((0,)), worker.device, torch.float32)
    worker.model.precision = torch.float32
    with flop_counter() as counter, torch.no_grad():
        worker.model.forward(params, torch.zeros(1, 3, size, size, device=worker.device), repeat_owner([1]))
    return float(counter.get_total_flops())


def stacked(lab: Lab, backbone: str, counts: Sequence[int], steps: int) -> Line:
    """Compare one task of C clients with C tasks of one."""
    experiment = task_of(lab, backbone, "float32", counts, steps)
    experiment.trained()
    together = lab.best(experiment.trained, 1 if lab.reduced else 3)
    alone = lab.best(lambda: [experiment.trained([c]) for c in range(len(counts))], 1 if lab.reduced else 3)
    return {
        "ms_stacked": round(1000 * together, 1),
        "ms_one_by_one": round(1000 * alone, 1),
        "ratio": round(alone / together, 2),
    }


def divided(lab: Lab, backbone: str, counts: Sequence[int], steps: int) -> Line:
    """Return the milliseconds of the parts of a train task: batches, attack, gradients, optimiser with clipping."""
    experiment = task_of(lab, backbone, "float32", counts, steps)
    experiment.trained()
    with timed_parts(lab, experiment) as seconds:
        total = lab.seconds(experiment.trained)
    parts = {name: round(1000 * value, 2) for name, value in seconds.items()}
    return {"ms": round(1000 * total, 2), **parts, "rest": round(1000 * (total - sum(seconds.values())), 2)}


@contextmanager
def timed_parts(lab: Lab, experiment: Experiment) -> Iterator[dict[str, float]]:
    """Measure the seconds of the parts of training inside the block, each with what it leaves on the device."""
    seconds: dict[str, float] = defaultdict(float)
    algorithm = experiment.worker.algorithm

    def timed(part: str, original: Callable[..., T]) -> Callable[..., T]:
        def call(*arguments: Any, **options: Any) -> T:
            lab.synchronise()
            started = time.perf_counter()
            result = original(*arguments, **options)
            lab.synchronise()
            seconds[part] += time.perf_counter() - started
            return result

        return call

    epoch = batches.CohortBatches.epoch

    def timed_epoch(images: batches.CohortBatches) -> Iterator[Any]:
        yield from iter(timed("batches", partial(next, epoch(images), None)), None)

    with ExitStack() as patches:
        for owner, name, part in (
            (optim.StackedOptimizer, "step", "optimiser"),
            (algorithm, "craft", "attack"),
            (algorithm, "gradients", "gradients"),
        ):
            patches.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        patches.enter_context(patch.object(batches.CohortBatches, "epoch", timed_epoch))
        yield seconds

"""Which precision and which attention kernel are fastest on this machine, by a short measurement.

Which one wins depends on the processor, the number of tokens and the batch. On CPUs, for example, the backward pass of torch's
fused attention in bfloat16 takes more than half of a training step with 17 tokens. A run measures once, before it
starts (`sylva_ray.preparation.resolve`); its config keeps what was chosen, so that every actor and every resume computes alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from sylva_ray.config.experiment import AttentionKernels
from sylva_ray.core.types import ParameterStack
from sylva_ray.models.cohort import CohortModel, num_clients, repeat_owner
from sylva_ray.models.kernels import DTYPES, Kernel

Precision = Literal["float32", "bfloat16"]

KERNEL_GAIN, PRECISION_GAIN = 0.9, 0.8
"""The default (fused attention, float32) is left for another choice that takes at most this share of its time."""

TIMED_PIXELS = 2**15
"""Pixels of the images in one timed step: 32 images of 32 x 32."""
MIN_IMAGES, REPEATS = 2, 3

KERNELS: tuple[Kernel, Kernel] = ("fused", "plain")


@dataclass(frozen=True)
class ComputeChoice:
    """What a measurement chose, and the milliseconds of a step it rests on: ``{"float32 fused": ms, ...}``."""

    precision: Precision
    attention: AttentionKernels
    milliseconds: Mapping[str, float]


def fastest(
    model: CohortModel, params: ParameterStack, image_size: int, device: torch.device, threads: int
) -> ComputeChoice:
    """Time a forward pass and an input gradient for every precision and attention kernel, and choose.

    Args:
        model: on ``device``; its precision and kernels are changed on the way and left undefined.
        params: ``{name: [C, ...]}``; C clients share the images.
        image_size: side of the images in pixels.
        threads: of the CPU, as many as an actor has.

    A precision in which the model cannot run (an architecture that creates float32 tensors of its own) is not chosen.
    """
    x, owner = _images(max(MIN_IMAGES, TIMED_PIXELS // image_size**2), image_size, num_clients(params), device)
    milliseconds: dict[str, float] = {}
    kernels: dict[str, Kernel] = {}
    with _cpu_threads(threads):
        for precision, dtype in DTYPES.items():
            for kernel in KERNELS[: 2 if model.num_attention_layers else 1]:
                model.precision, model.kernels = dtype, AttentionKernels(float32=kernel, bfloat16=kernel)
                try:
                    milliseconds[f"{precision} {kernel}"] = _step_milliseconds(model, params, x, owner)
                except RuntimeError:
                    if precision == "float32":
                        raise
            fused, plain = (milliseconds.get(f"{precision} {kernel}", math.inf) for kernel in KERNELS)
            kernels[precision] = "plain" if plain < KERNEL_GAIN * fused else "fused"
    best = {precision: milliseconds.get(f"{precision} {kernel}", math.inf) for precision, kernel in kernels.items()}
    is_faster = best["bfloat16"] < PRECISION_GAIN * best["float32"]
    return ComputeChoice("bfloat16" if is_faster else "float32", AttentionKernels(**kernels), milliseconds)


def can_run(
    model: CohortModel, params: ParameterStack, image_size: int, device: torch.device, precision: Precision
) -> bool:
    """Whether the model runs forward and backward in ``precision``; the arguments are those of `fastest`."""
    x, owner = _images(MIN_IMAGES, image_size, num_clients(params), device)
    model.precision = DTYPES[precision]
    try:
        _step_milliseconds(model, params, x, owner)
    except RuntimeError:
        return False
    return True


def _images(count: int, size: int, clients: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [N, 3, size, size]``, and an owner vector that gives every client about as many."""
    x = torch.linspace(0, 1, count * 3 * size**2, device=device).reshape(count, 3, size, size)
    return x, repeat_owner([len(rows) for rows in torch.arange(count).tensor_split(clients)])


@contextmanager
def _cpu_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _step_milliseconds(model: CohortModel, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> float:
    """The best of `REPEATS` steps, after one that warms up; on a CPU in CPU time, which other processes disturb less."""
    clock = time.perf_counter if x.is_cuda else time.process_time
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    seconds = []
    for _ in range(1 + REPEATS):
        started = clock()
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model.forward(params, leaf, owner), labels, reduction="sum"), leaf)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return 1000 * min(seconds[1:])

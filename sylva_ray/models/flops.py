"""The floating-point operations of a forward pass, as torch counts them, and how many a second this machine does."""

from __future__ import annotations

import math
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.types import ClientState, stack_states
from sylva_ray.models.cohort import CohortModel, repeat_owner, to_parameters


def multiplication_rate(precision: str, threads: int, seconds: float = 0.2) -> float:
    """Measure how fast this machine's CPU multiplies large matrices.

    Args:
        precision: ``float32`` or ``bfloat16``.
        threads: of the process that multiplies.
        seconds: after which no further product is begun.

    Returns:
        FLOP/s of the fastest product.
    """
    before = torch.get_num_threads()
    size, best, started = 256, math.inf, time.perf_counter()
    matrix = torch.ones(size, size, dtype=getattr(torch, precision))
    torch.set_num_threads(threads)
    try:
        while math.isinf(best) or time.perf_counter() < started + seconds:
            begun = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - begun)
    finally:
        torch.set_num_threads(before)
    return 2.0 * size**3 / best


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which also counts the products that adapters add in place (`LinearWithUpdates`)."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _stacked_product})


def _stacked_product(_: object, a: tuple[int, ...], b: tuple[int, ...], **__: object) -> int:
    """Return the FLOPs of the products of two stacks of matrices with these shapes."""
    return 2 * a[0] * a[1] * a[2] * b[2]


def count_flops(model: CohortModel, state: ClientState, image_size: int) -> int:
    """Return the FLOPs of the products of one image's forward pass: two per multiplication and addition.

    The attention is counted as two matrix products, which is what a fused kernel computes, too.

    Args:
        model: on the CPU; its kernels and precision are those that it had before.
        state: of a client.
        image_size: side of the data set's images in pixels.
    """
    params = to_parameters(stack_states([state]), "cpu", torch.float32)
    kernels, precision = model.kernels, model.precision
    model.kernels, model.precision = AttentionKernels(float32="plain", bfloat16="plain"), torch.float32
    try:
        with flop_counter() as counter, torch.no_grad():
            model.forward(params, torch.zeros(1, 3, image_size, image_size), repeat_owner([1]))
    finally:
        model.kernels, model.precision = kernels, precision
    return int(counter.get_total_flops())

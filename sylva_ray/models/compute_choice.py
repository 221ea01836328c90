"""Measure which precision and which attention kernel are fastest on this machine.

The result depends on the processor, the number of tokens and the batch. On CPUs, for example, the backward pass of
torch's fused attention in bfloat16 takes more than half of a training step with 17 tokens. A run measures once, before
it starts (`sylva_ray.preparation.resolve`). Its configuration records the choice, so that all actors and a resumed run
compute alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.failures import is_out_of_memory
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import torch_dtype
from sylva_ray.core.types import ParameterStack
from sylva_ray.models.cohort import CohortModel, num_clients, repeat_owner
from sylva_ray.models.kernels import Kernel, deterministic_kernels

Precision = Literal["float32", "bfloat16"]

KERNEL_GAIN, PRECISION_GAIN = 0.9, 0.8
"""Largest fraction of the default's time (fused attention, float32) that another choice may take to replace it."""

TIMED_PIXELS = {"cpu": 2**15, "cuda": 2**22}
"""Pixels of the images in one timed step, at the model's size: 32 images of 32 x 32 on a CPU, more to fill a GPU."""

NUM_TURNS, MAX_SECONDS = 4, 3.0
"""Timed steps of every alternative; none after this time. The first one warms up."""

LOOK, NUM_LOOKS, HOPELESS = 1 / 16, 2, 3.0
"""Before, every alternative is timed so often with this fraction of the images, since a processor that emulates a
precision takes seconds for a step. What then takes so many times as long as the best is not timed again."""

KERNELS: tuple[Kernel, ...] = ("fused", "plain")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")

Alternative = tuple[Precision, Kernel]


@dataclass(frozen=True)
class ComputeChoice:
    """The result of a measurement.

    Attributes:
        precision: the faster precision, by a margin.
        attention: the faster kernel of each precision, by a margin.
        milliseconds: of one step, ``{(precision, kernel): ms}``; a missing alternative cannot run. For those that were
            not timed again it is estimated.
    """

    precision: Precision
    attention: AttentionKernels
    milliseconds: Mapping[Alternative, float]


def fastest(
    model: CohortModel,
    params: ParameterStack,
    image_size: int,
    device: torch.device,
    threads: int,
    pinned: AttentionKernels | None = None,
    tf32: bool = False,
) -> ComputeChoice:
    """Time a forward pass and an input gradient for every precision and attention kernel, and choose the fastest.

    A precision in which the model cannot run is not chosen; an architecture may create float32 tensors of its own.

    Args:
        model: on ``device``; its precision and kernels are undefined afterwards.
        params: ``{name: [C, ...]}``; the C clients own equally many of the images.
        image_size: side of the data set's images in pixels.
        device: where to measure.
        threads: threads of the CPU that an actor has.
        pinned: the kernels to use; None: choose them as well.
        tf32: see `deterministic_kernels`.
    """
    allowed: dict[Precision, tuple[Kernel, ...]] = {
        p: KERNELS if pinned is None else (getattr(pinned, p),) for p in PRECISIONS
    }
    if not model.num_attention_layers:
        allowed = {p: kernels[:1] for p, kernels in allowed.items()}
    pixels = TIMED_PIXELS[device.type]
    few, many = (_images(model, image_size, num_clients(params), device, round(part * pixels)) for part in (LOOK, 1))
    with _cpu_threads(threads):
        deterministic_kernels(device, tf32)
        alternatives = [(p, kernel) for p in PRECISIONS for kernel in allowed[p]]
        looks = _shortest(model, params, *few, alternatives, threads, NUM_LOOKS)
        hopeless = {alternative for alternative, ms in looks.items() if ms > HOPELESS * min(looks.values())}
        milliseconds = {alternative: looks[alternative] * len(many[0]) / len(few[0]) for alternative in hopeless}
        hopeful = [alternative for alternative in looks if alternative not in hopeless]
        milliseconds |= _shortest(model, params, *many, hopeful, threads, NUM_TURNS)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _choice(milliseconds, pinned)


def _shortest(
    model: CohortModel,
    params: ParameterStack,
    x: torch.Tensor,
    owner: torch.Tensor,
    alternatives: Sequence[Alternative],
    threads: int,
    turns: int,
) -> dict[Alternative, float]:
    """Return the shortest of several steps in milliseconds, without the alternatives that cannot run."""
    shortest = dict.fromkeys(alternatives, math.inf)
    started = time.perf_counter()
    for _ in range(turns):
        for alternative, best in list(shortest.items()):
            step = _step_milliseconds(model, params, x, owner, alternative, threads)
            if step is None:
                del shortest[alternative]
            else:
                shortest[alternative] = min(best, step)
        if time.perf_counter() - started > MAX_SECONDS:
            break
    return shortest


def _choice(milliseconds: Mapping[Alternative, float], pinned: AttentionKernels | None) -> ComputeChoice:
    """Choose by the margins `KERNEL_GAIN` and `PRECISION_GAIN`."""
    kernels: dict[str, Kernel] = {}
    for precision in PRECISIONS:
        fused, plain = (milliseconds.get((precision, kernel), math.inf) for kernel in KERNELS)
        kernels[precision] = "plain" if plain < KERNEL_GAIN * fused else "fused"
    attention = AttentionKernels(**kernels) if pinned is None else pinned
    low = milliseconds.get(("bfloat16", attention.bfloat16), math.inf)
    full = milliseconds.get(("float32", attention.float32), math.inf)
    return ComputeChoice("bfloat16" if low < PRECISION_GAIN * full else "float32", attention, milliseconds)


def can_run(
    model: CohortModel, params: ParameterStack, image_size: int, device: torch.device, alternative: Alternative
) -> bool:
    """Return whether the model can run a forward and a backward pass; other arguments are as in `fastest`."""
    x, owner = _images(model, image_size, num_clients(params), device, pixels=1)
    return _step_milliseconds(model, params, x, owner, alternative, threads=1) is not None


def _images(
    model: CohortModel, size: int, clients: int, device: torch.device, pixels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images ``[N, 3, size, size]`` and their owners: about ``pixels`` at the model's size."""
    each = max(1, pixels // (clients * max(size, model.image_size) ** 2))
    count = each * clients
    x = torch.linspace(0, 1, count * 3 * size**2, device=device).reshape(count, 3, size, size)
    return x, repeat_owner([each] * clients)


@contextmanager
def _cpu_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _step_milliseconds(
    model: CohortModel,
    params: ParameterStack,
    x: torch.Tensor,
    owner: torch.Tensor,
    alternative: Alternative,
    threads: int,
) -> float | None:
    """Time one step; None if the model cannot run in this alternative or the memory is too small.

    One thread is timed by its CPU time, which other processes disturb less; several threads also wait for each other.
    """
    precision, kernel = alternative
    model.precision, model.kernels = torch_dtype(precision), AttentionKernels(float32=kernel, bfloat16=kernel)
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    clock = time.process_time if threads == 1 and not x.is_cuda else time.perf_counter
    started = clock()
    try:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(
            torch.nn.functional.cross_entropy(model.forward(params, leaf, owner), labels, reduction="sum"), leaf
        )
        if x.is_cuda:
            torch.cuda.synchronize()
    except Exception as error:
        if precision == "float32" and not is_out_of_memory(error):
            raise
        return None
    return 1000 * (clock() - started)

"""Measure a forward pass with an input gradient, by precision and attention kernel, on a stack of clients.

    python benchmarks/step.py [--backbone NAME] [--images 128] [--clients 1] [--threads 1] [--device cuda]

One step is what an attack repeats: the logits of all images with their owners' adapters, and the gradient with respect
to the pixels. The table gives milliseconds (CPU time, or wall time on a GPU; the lowest of several), the ratio to
float32 with fused attention, the fraction of pixels whose gradient has the sign of float32, and the rate of the matrix
products of the step. For
comparison, the rate of one large product is printed: what the hardware can do.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.config.experiment import DEFAULT_BACKBONE, BackboneSection, LoraSection
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import stack_states
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import repeat_owner, to_parameters
from sylva_ray.models.compute_choice import fastest
from sylva_ray.models.flops import flop_counter
from sylva_ray.models.lora import LoraStack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

REPEATS = 9
NUM_CLASSES = 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch.device(given.device)

    stack = LoraStack(create_backbone(BackboneSection(name=given.backbone), NUM_CLASSES), LoraSection())
    stack.backbone.to(device)
    size = stack.backbone.image_size
    states = [stack.initial_state(generator(0, "state", client)) for client in range(given.clients)]
    params = to_parameters(stack_states(states), device, torch.float32)
    draw = generator(0, "images")
    x = torch.rand(given.images, 3, size, size, generator=draw).to(device)
    y = torch.randint(0, NUM_CLASSES, (given.images,), generator=draw).to(device)
    owner = repeat_owner([len(rows) for rows in torch.arange(given.images).tensor_split(given.clients)])

    def step() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(stack.forward(params, leaf, owner), y).sum(), leaf)
        return gradient

    with flop_counter() as counter, torch.no_grad():
        stack.forward(params, x, owner)
    flops = 2 * counter.get_total_flops()  # an input gradient repeats every product once, with the other factor
    print(
        f"{given.backbone}, {given.images} images of {size} px, {given.clients} clients, {given.threads} threads, ",
        end="",
    )
    print(f"{device_name(device)}, torch {torch.__version__}")
    print(f"products of one step: {flops / 1e9:.1f} GFLOP; one large product reaches ", end="")
    print(", ".join(f"{name} {product_rate(dtype, device):.0f} GFLOP/s" for name, dtype in DTYPES.items()))
    print(f"{'':24}{'ms':>8}{'ratio':>8}{'signs %':>9}{'GFLOP/s':>9}")
    reference_ms, reference = 0.0, torch.zeros(0)
    for precision, dtype in DTYPES.items():
        for kernel in ("fused", "plain") if stack.num_attention_layers else ("fused",):
            stack.precision, stack.kernels = dtype, AttentionKernels(float32=kernel, bfloat16=kernel)
            milliseconds, gradient = best(step, given.repeats, device)
            if not reference_ms:
                reference_ms, reference = milliseconds, gradient
            report(f"{precision} {kernel}", milliseconds, reference_ms, gradient, reference, flops)
    choice = fastest(stack, params, size, device, given.threads)
    print(f"auto: {choice.precision}; attention {choice.attention.float32} in float32, ", end="")
    print(f"{choice.attention.bfloat16} in bfloat16")


def report(
    name: str, milliseconds: float, reference_ms: float, gradient: torch.Tensor, reference: torch.Tensor, flops: int
) -> None:
    """Print one row of the table."""
    signs = 100 * float((gradient.sign() == reference.sign()).float().mean())
    rate = flops / milliseconds / 1e6
    print(f"{name:24}{milliseconds:8.1f}{milliseconds / reference_ms:8.2f}{signs:9.2f}{rate:9.0f}", flush=True)


def best(step: Callable[[], torch.Tensor], repeats: int, device: torch.device) -> tuple[float, torch.Tensor]:
    """Return the milliseconds of the fastest of ``repeats`` steps, after one to warm up, and a step's result."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    milliseconds = []
    for _ in range(1 + repeats):
        started = clock()
        result = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        milliseconds.append(1000 * (clock() - started))
    return min(milliseconds[1:]), result


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the GFLOP/s of one square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.ones(side, side, dtype=dtype, device=device)
    milliseconds, _ = best(lambda: a @ a, 5, device)
    return 2 * side**3 / milliseconds / 1e6


def device_name(device: torch.device) -> str:
    """Return the name of the processor or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith(("model name", "flags"))]
        amx = " with AMX" if any("amx_bf16" in line for line in lines) else ""
        return lines[0].partition(":")[2].strip() + amx
    except (OSError, IndexError):
        return platform.processor()


if __name__ == "__main__":
    main()

"""Measure what the size of a window costs on a CPU: images per CPU second, forward and backward.

    python benchmarks/windows.py [--backbone NAME] [--windows 1 2 4 8 16] [--images 16] [--precision float32]

Every row passes the same images of one client, in windows of one size, with the gradient of its adapters. The sizes
take turns, and the best of several rounds counts. The table gives images per CPU second, and that relative to the
largest window.
"""

from __future__ import annotations

import argparse
import time

import torch

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.config.experiment import DEFAULT_BACKBONE, BackboneSection, LoraSection
from sylva_ray.core.precision import torch_dtype
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ParameterStack, stack_states
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import to_parameters
from sylva_ray.models.flops import flop_counter
from sylva_ray.models.lora import LoraStack

NUM_CLASSES = 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    stack = LoraStack(create_backbone(BackboneSection(name=given.backbone), NUM_CLASSES), LoraSection())
    stack.precision = torch_dtype(given.precision)
    size = stack.backbone.image_size
    params = to_parameters(
        stack_states([stack.initial_state(generator(0, "state", 0))]), torch.device("cpu"), torch.float32
    )
    x = torch.rand(given.images, 3, size, size, generator=generator(0, "images"))
    with flop_counter() as counter, torch.no_grad():
        stack.forward(params, x[:1], torch.zeros(1, dtype=torch.long))
    operations = counter.get_total_flops()
    print(f"{given.backbone}, {size} px, {given.precision}, {given.threads} threads, torch {torch.__version__}")
    print(f"forward pass of one image: {operations / 2e9:.3g} billion multiply-adds")
    seconds = {window: float("inf") for window in given.windows}
    for _ in range(given.repeats):
        for window in given.windows:
            started = time.process_time()
            for part in x.split(window):
                step(stack, params, part)
            seconds[window] = min(seconds[window], time.process_time() - started)
    print(f"{'images':>8}{'10^9':>8}{'images/s':>10}{'ratio':>8}")
    largest = seconds[max(given.windows)]
    for window, value in seconds.items():
        billions = window * operations / 2e9
        print(f"{window:>8}{billions:>8.3g}{given.images / value:>10.2f}{largest / value:>8.3f}")


def step(stack: LoraStack, params: ParameterStack, x: torch.Tensor) -> None:
    """Compute the gradient of the adapters for one window."""
    leaves = {name: value.detach().requires_grad_(stack.trainable(name)) for name, value in params.items()}
    loss = cross_entropy(stack.forward(leaves, x, torch.zeros(len(x), dtype=torch.long)), torch.zeros(len(x)).long())
    torch.autograd.grad(loss.sum(), [value for value in leaves.values() if value.requires_grad], allow_unused=True)


if __name__ == "__main__":
    main()

"""Part 4: the memory of an image in every kind of pass, and of the tasks of an actor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.gpu.lab import Lab, Line
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.config.experiment import BackboneSection, LoraSection
from sylva_ray.core.precision import torch_dtype
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ParameterStack, stack_states
from sylva_ray.federation.stages.layer_game.coalitions import CoalitionWalk
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import client_gradients, repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack

CARD = 22 * 2**30
"""Bytes that an actor may use of a card of 24 GB."""


def memory(lab: Lab) -> Iterator[Line]:
    """Yield peaks by model, precision, pass and images."""
    backbones = ("vit_micro",) if lab.reduced else ("vit_base_patch16_224", "vit_small_patch16_224", "vit_micro")
    for backbone in backbones:
        for precision in ("float32", "bfloat16"):
            stack = adapted(lab, backbone, precision)
            for name, work in passes(lab, stack, 2).items():
                yield {
                    "item": f"{backbone}, {precision}, {name}",
                    **slope(lab, work, *((2, 4) if lab.reduced else (8, 32))),
                }
    yield {"item": f"{backbones[0]}, coalition walk", **walk(lab, backbones[0])}


def adapted(lab: Lab, backbone: str, precision: str) -> LoraStack:
    """Return a backbone with random weights and adapters on the device."""
    stack = LoraStack(create_backbone(BackboneSection(name=backbone), 10), LoraSection(), torch_dtype(precision))
    stack.backbone.to(lab.device)
    return stack


def parameters(lab: Lab, stack: LoraStack, clients: int) -> ParameterStack:
    """Return the parameters of C clients on the device."""
    states = [stack.initial_state(generator(0, "state", client)) for client in range(clients)]
    return to_parameters(stack_states(states), lab.device, torch.float32)


def passes(lab: Lab, stack: LoraStack, clients: int) -> dict[str, Callable[[int], object]]:
    """Return the three kinds of passes, each for a number of images of C clients together."""
    params = parameters(lab, stack, clients)

    def images(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.rand(count, 3, stack.image_size, stack.image_size, device=lab.device)
        return x, torch.zeros(count, dtype=torch.long, device=lab.device), repeat_owner([count // clients] * clients)

    def train(count: int) -> object:
        x, y, owner = images(count)
        return client_gradients(
            params, sorted(params), lambda p: cross_entropy(stack.forward(p, x, owner), y).view(clients, -1).mean(1)
        )

    def attack(count: int) -> object:
        x, y, owner = images(count)
        leaf = x.requires_grad_()
        return torch.autograd.grad(cross_entropy(stack.forward(params, leaf, owner), y).sum(), leaf)

    def evaluate(count: int) -> object:
        x, _, owner = images(count)
        with torch.no_grad():
            return stack.forward(params, x, owner)

    return {"train": train, "attack": attack, "evaluate": evaluate}


def slope(lab: Lab, work: Callable[[int], object], few: int, many: int) -> Line:
    """Return the bytes of an image, from two numbers of images, and what fits into 22 GiB by them.

    On a CPU, only the tensors that autograd saves are counted.
    """
    low, high = peak(lab, lambda: work(few)), peak(lab, lambda: work(many))
    if low is None or high is None:
        return {"out_of_memory_at": few if low is None else many}
    each = max(1, (high - low) / (many - few))
    return {
        "mb_per_image": round(each / 1e6, 3),
        "peak_mb": round(high / 1e6, 1),
        "images": many,
        "images_in_22_gib": int((CARD - (low - few * each)) / each) if lab.is_cuda else None,
    }


def peak(lab: Lab, work: Callable[[], object]) -> int | None:
    """Return the peak of allocated bytes during some work; None if it runs out of memory."""
    if not lab.is_cuda:
        return saved_bytes(work)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        work()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return torch.cuda.max_memory_allocated()


def saved_bytes(work: Callable[[], object]) -> int:
    """Return the bytes of the storages that autograd saves during some work, each once."""
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor.detach())  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())


def walk(lab: Lab, backbone: str) -> Line:
    """Return the peak of a walk over coalitions, on a GPU also as a number of stacks of tokens."""
    stack = adapted(lab, backbone, "float32")
    assert stack.num_blocks is not None
    images, max_stack = (4, 16) if lab.reduced else (32, 512)
    pair = parameters(lab, stack, 2)
    coalitions = np.random.default_rng(0).random((64, len(stack.players))) < 0.5
    x = torch.rand(images, 3, stack.image_size, stack.image_size, device=lab.device)
    y = torch.zeros(images, dtype=torch.long, device=lab.device)
    before = torch.cuda.memory_allocated() if lab.is_cuda else 0
    found = peak(lab, CoalitionWalk(stack, pair, coalitions, x, y, max_stack).run)
    with torch.no_grad():
        tokens = stack.embed(x[:1])
    one_stack = max_stack * tokens.numel() * 4
    return {
        "blocks": stack.num_blocks,
        "mb_per_stack": round(one_stack / 1e6, 1),
        "stacks": round((found - before) / one_stack, 1) if lab.is_cuda and found else None,
    }

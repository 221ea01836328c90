"""The stacked optimiser is C torch optimisers; who has no data does not move."""

from __future__ import annotations

import pytest
import torch

from sylva_ray.config.experiment import TrainingSection
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.client.optim import StackedOptimizer, clip_per_client

SHAPES = {"a": (4, 3), "b": (2,)}


def stack_of(count: int, seed: int) -> ParameterStack:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_client_moves_as_if_alone(name: str) -> None:
    training = TrainingSection(optimizer=name, weight_decay=0.1)
    params = stack_of(3, 0)
    alone = [[torch.nn.Parameter(v[c].clone()) for v in params.values()] for c in range(3)]
    reference: list[torch.optim.Optimizer]
    if name == "adamw":
        reference = [torch.optim.AdamW(own, lr=0.05, weight_decay=0.1) for own in alone]
    else:
        reference = [torch.optim.SGD(own, lr=0.05, momentum=0.9) for own in alone]
    optimizer = StackedOptimizer(params, training, lr=0.05)
    for step in range(6):
        gradients = stack_of(3, 10 + step)
        active = torch.tensor([True, step % 2 == 0, step < 3])  # clients pause and run out of data
        for c in active.nonzero()[:, 0].tolist():
            for p, g in zip(alone[c], gradients.values(), strict=True):
                if name == "sgd":
                    p.data *= 1 - 0.05 * 0.1  # decoupled decay
                p.grad = g[c].clone()
            reference[c].step()
        optimizer.step(gradients, active)
    for c in range(3):
        for value, p in zip(params.values(), alone[c], strict=True):
            torch.testing.assert_close(value[c], p.data, rtol=1e-12, atol=1e-12)


def test_a_paused_or_masked_row_is_bit_identical() -> None:
    params = stack_of(2, 0)
    before = {n: v.clone() for n, v in params.items()}
    optimizer = StackedOptimizer(params, TrainingSection(weight_decay=0.1), lr=0.1)
    masks = {"a": torch.tensor([True, True]), "b": torch.tensor([False, True])}
    optimizer.step(stack_of(2, 1), torch.tensor([True, False]), masks)
    assert not torch.equal(params["a"][0], before["a"][0])
    assert torch.equal(params["b"][0], before["b"][0])
    assert torch.equal(params["a"][1], before["a"][1])
    assert torch.equal(params["b"][1], before["b"][1])


def test_clipping_is_torchs_own_per_client() -> None:
    gradients = stack_of(3, 0)
    clipped = clip_per_client(gradients, 1.5)
    for c in range(3):
        own = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SHAPES.values()]
        for p, g in zip(own, gradients.values(), strict=True):
            p.grad = g[c].clone()
        torch.nn.utils.clip_grad_norm_(own, 1.5)
        for p, g in zip(own, clipped.values(), strict=True):
            torch.testing.assert_close(g[c], p.grad, rtol=1e-12, atol=0)

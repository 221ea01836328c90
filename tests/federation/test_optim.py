"""The stacked optimiser is C torch optimisers; who has no data does not move."""

from __future__ import annotations

import pytest
import torch

from sylva_ray.config.training import TrainingSection
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.client.optim import StackedOptimizer, clip_per_client

SHAPES = {"a": (4, 3), "b": (2,)}


def stack_of(count: int, seed: int) -> ParameterStack:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_client_moves_as_if_alone(name: str) -> None:
    training = TrainingSection(optimizer=name, weight_decay=0.1, clip_norm=None)
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
    masks = {"a": torch.tensor([True, True]), "b": torch.tensor([False, True])}
    optimizer = StackedOptimizer(params, TrainingSection(weight_decay=0.1), 0.1, masks)
    gradients = stack_of(2, 1)
    gradients["b"][0] = float("inf")  # such a gradient of what may not change does not reach what may
    optimizer.step(gradients, torch.tensor([True, False]))
    assert params["a"].isfinite().all()
    assert not torch.equal(params["a"][0], before["a"][0])
    assert torch.equal(params["b"][0], before["b"][0])
    assert torch.equal(params["a"][1], before["a"][1])
    assert torch.equal(params["b"][1], before["b"][1])


def test_clipping_is_torchs_own_per_client() -> None:
    gradients = stack_of(3, 0)
    flat = [value.reshape(3, -1).clone() for value in gradients.values()]
    clip_per_client(flat, 1.5)
    for c in range(3):
        own = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SHAPES.values()]
        for p, g in zip(own, gradients.values(), strict=True):
            p.grad = g[c].clone()
        torch.nn.utils.clip_grad_norm_(own, 1.5)
        for p, g in zip(own, flat, strict=True):
            torch.testing.assert_close(g[c].view_as(p), p.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_layout_of_gradients_and_matrices_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of adapters arrive transposed, and large models are divided among several matrices."""
    training = TrainingSection(optimizer=name)
    found = []
    for transposed, limit in ((False, 2**26), (True, 2**26), (False, 1)):
        monkeypatch.setattr("sylva_ray.federation.client.optim.MAX_ELEMENTS", limit)
        params = stack_of(2, 0)
        optimizer = StackedOptimizer(params, training, lr=0.05)
        for step in range(3):
            gradients = stack_of(2, 10 + step)
            if transposed and step != 1:  # in one step they arrive in another layout than in the first
                gradients["a"] = gradients["a"].mT.contiguous().mT
            optimizer.step(gradients, torch.tensor([True, True]))
        found.append({key: value.clone() for key, value in params.items()})
    for other in found[1:]:
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-12, atol=1e-12)


def test_no_option_has_an_effect_on_whom_it_does_not_concern() -> None:
    """A client whose gradient is not finite harms no other one, and one that never had data stays, whatever decays."""
    params = stack_of(3, 0)
    before = {n: v.clone() for n, v in params.items()}
    optimizer = StackedOptimizer(params, TrainingSection(weight_decay=0.1), lr=0.1)
    for step in range(3):
        gradients = stack_of(3, step)
        for value in gradients.values():
            value[1] = float("nan")
        optimizer.step(gradients, torch.tensor([True, True, False]))
    assert all(value[0].isfinite().all() for value in params.values())
    assert all(value[1].isnan().all() for value in params.values())
    assert all(torch.equal(value[2], before[name][2]) for name, value in params.items())

"""Blending with gates is blending the models themselves, and hard-concrete gates reach both ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pytest
import torch

from sylva_ray.config.experiment import BackboneSection, LoraSection
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ClientState, ParameterStack, stack_states
from sylva_ray.federation.stages.layer_game.gates import HIGH, LOW, TEMPERATURE, blend, expected_gates, sampled_gates
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import FunctionalStack, repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack
from tests.models.test_lora_stack import random_states

Ends: TypeAlias = tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]
"""The states at either end of the gates, theta^r and theta^b."""

LORA = LoraSection(rank=2)
COUNTS = [2, 3]


@pytest.fixture(scope="module")
def stack() -> LoraStack:
    return LoraStack(create_backbone(BackboneSection(), 10), LORA)


@pytest.fixture(scope="module")
def exact() -> LoraStack:
    """The same in float64."""
    return LoraStack(create_backbone(BackboneSection(), 10).double(), LORA)


@pytest.fixture(scope="module")
def ends(stack: LoraStack) -> Ends:
    """theta^r and theta^b of two clients."""
    states = random_states(stack, 4)
    return states[:2], states[2:]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(sum(COUNTS), 3, 32, 32, generator=generator(0, "x"))


def parameters(states: Sequence[ClientState], dtype: torch.dtype = torch.float32) -> ParameterStack:
    return to_parameters(stack_states(states), "cpu", dtype)


def logits(stack: LoraStack, ends: Ends, gates: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    mixed = blend(parameters(ends[0], images.dtype), parameters(ends[1], images.dtype), gates, stack.players)
    with torch.no_grad():
        return stack.forward(mixed, images, repeat_owner(COUNTS))


def test_the_ends_of_the_gates_are_the_ends(stack: LoraStack, ends: Ends, images: torch.Tensor) -> None:
    """All 0 gives theta^r's logits, all 1 theta^b's; also when one client stands at either end."""
    with torch.no_grad():
        robust, benign = (stack.forward(parameters(end), images, repeat_owner(COUNTS)) for end in ends)
    assert (robust - benign).abs().max() > 0.1
    shape = (2, len(stack.players))
    torch.testing.assert_close(logits(stack, ends, torch.zeros(shape), images), robust, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(stack, ends, torch.ones(shape), images), benign, rtol=0, atol=1e-5)
    apart = logits(stack, ends, torch.tensor([[0.0], [1.0]]).expand(shape), images)
    torch.testing.assert_close(apart, torch.cat([robust[:2], benign[2:]]), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def gates(stack: LoraStack) -> torch.Tensor:
    """Different for every client and player."""
    return torch.rand(2, len(stack.players), generator=generator(0, "gates"), dtype=torch.float64)


@pytest.fixture(scope="module")
def dense(stack: LoraStack, ends: Ends, gates: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Logits of whole models with W + s [(1 - alpha) B^r A^r + alpha B^b A^b], and heads interpolated."""
    full = FunctionalStack(create_backbone(BackboneSection(), 10).double())
    models = []
    for client in range(2):
        robust, benign = ends[0][client], ends[1][client]
        weights = full.initial_state(generator(0, "initial state"))
        for alpha, names in zip(gates[client].numpy(), stack.players.values(), strict=True):
            for name in names:
                if name.endswith(".lora_A"):
                    module = name.removesuffix(".lora_A")
                    own, other = (state[f"{module}.lora_B"].astype(float) @ state[name] for state in (robust, benign))
                    weights[f"{module}.weight"] += LORA.alpha / LORA.rank * ((1 - alpha) * own + alpha * other)
                elif not name.endswith(".lora_B"):
                    weights[name] = (1 - alpha) * robust[name].astype(float) + alpha * benign[name]
        models.append(weights)
    with torch.no_grad():
        return full.forward(parameters(models, torch.float64), images.double(), repeat_owner(COUNTS))


def test_a_blend_is_the_blend_of_the_weight_matrices(
    exact: LoraStack, ends: Ends, gates: torch.Tensor, images: torch.Tensor, dense: torch.Tensor
) -> None:
    torch.testing.assert_close(logits(exact, ends, gates, images.double()), dense, rtol=0, atol=1e-10)


def test_interpolating_the_factors_apart_is_another_model(
    exact: LoraStack, ends: Ends, gates: torch.Tensor, images: torch.Tensor, dense: torch.Tensor
) -> None:
    mixed = {}
    for player, names in enumerate(exact.players.values()):
        for name in names:
            own, other = (parameters(end, torch.float64)[name] for end in ends)
            mixed[name] = torch.lerp(own, other, gates[:, player].view(-1, *[1] * (own.ndim - 1)))
    with torch.no_grad():
        apart = exact.forward(mixed, images.double(), repeat_owner(COUNTS))
    assert (apart - dense).abs().max() > 0.05


def test_every_gate_has_a_gradient_and_no_weight_has_one(stack: LoraStack, ends: Ends, images: torch.Tensor) -> None:
    gates = torch.full((2, len(stack.players)), 0.5, requires_grad=True)
    robust, benign = parameters(ends[0]), parameters(ends[1])
    logits = stack.forward(blend(robust, benign, gates, stack.players), images, repeat_owner(COUNTS))
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), gates)
    assert (gradient != 0).all()
    assert not any(value.requires_grad for value in (*robust.values(), *benign.values()))


def test_a_draw_in_the_middle_is_the_stretched_sigmoid() -> None:
    log_alpha = torch.tensor([-1.0, 0.0, 0.4])
    expected = torch.sigmoid(log_alpha / TEMPERATURE) * (HIGH - LOW) + LOW
    torch.testing.assert_close(sampled_gates(log_alpha, torch.full((3,), 0.5)), expected)
    torch.testing.assert_close(expected_gates(torch.zeros(1)), torch.tensor([0.5]))


def test_gates_reach_both_ends_as_often_as_the_distribution_says() -> None:
    """P(gate = 0) = sigmoid(T log(-low / high) - log alpha) (Louizos et al. 2018, eq. 12)."""
    uniform = torch.rand(100_000, generator=generator(0, "uniform"))
    for log_alpha in (-2.0, 0.0, 1.5):
        drawn = sampled_gates(torch.tensor(log_alpha), uniform)
        assert drawn.min() >= 0
        assert drawn.max() <= 1
        closed = 1 / (1 + np.exp(log_alpha - TEMPERATURE * np.log(-LOW / HIGH)))
        opened = 1 / (1 + np.exp(-log_alpha - TEMPERATURE * np.log(-LOW / HIGH)))
        assert (drawn == 0).float().mean() == pytest.approx(closed, abs=5e-3)
        assert (drawn == 1).float().mean() == pytest.approx(opened, abs=5e-3)


def test_the_ends_of_the_uniform_draw_are_no_nan() -> None:
    drawn = sampled_gates(torch.zeros(2, requires_grad=True), torch.tensor([0.0, 1.0]))
    assert drawn.tolist() == [0, 1]
    assert expected_gates(torch.tensor([-50.0, 50.0])).tolist() == [0, 1]

"""Prefix sharing gives the same values as one forward per coalition, for exactly 2^(L+1) - 2 block evaluations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sylva_ray.attacks.losses import true_class_probability
from sylva_ray.config.experiment import BackboneSection, LoraSection
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ParameterStack, stack_states
from sylva_ray.federation.stages.layer_game.coalitions import CoalitionWalk, mix
from sylva_ray.federation.stages.layer_game.shapley import all_coalitions, exact_shapley
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack
from sylva_ray.models.memory import LiveBytes
from tests.models.test_lora_stack import random_states

N = 3


@pytest.fixture(scope="module")
def stack() -> LoraStack:
    return LoraStack(create_backbone(BackboneSection(), 10), LoraSection(rank=2))


@pytest.fixture(scope="module")
def pair(stack: LoraStack) -> ParameterStack:
    return to_parameters(stack_states(random_states(stack, 2)), "cpu", torch.float32)


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(N, 3, 32, 32, generator=generator(0, "x")), torch.tensor([1, 4, 7])


def naive(
    stack: LoraStack, pair: ParameterStack, coalitions: np.ndarray, x: torch.Tensor, y: torch.Tensor
) -> np.ndarray:
    robust, benign = ({n: v[i : i + 1] for n, v in pair.items()} for i in (0, 1))
    rows = []
    for coalition in coalitions:
        mixed = mix(robust, benign, coalition[None], stack.players)
        with torch.no_grad():
            rows.append(true_class_probability(stack.forward(mixed, x, repeat_owner([N])), y).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("max_stack", [4096, 7, 1], ids=["breadth first", "split", "depth first"])
def test_prefix_sharing_equals_whole_forwards(
    stack: LoraStack, pair: ParameterStack, images: tuple[torch.Tensor, torch.Tensor], max_stack: int
) -> None:
    coalitions = all_coalitions(7)
    walk = CoalitionWalk(stack, pair, coalitions, *images, max_stack=max_stack)
    values = walk.run()
    assert walk.block_evaluations == 2**7 - 2
    sample = np.random.default_rng(0).choice(128, 12, replace=False)
    np.testing.assert_allclose(values[sample], naive(stack, pair, coalitions[sample], *images), atol=1e-5)


def test_sampled_coalitions_in_any_order(
    stack: LoraStack, pair: ParameterStack, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    coalitions = all_coalitions(7)[[127, 0, 3, 90, 64]]
    np.testing.assert_allclose(
        CoalitionWalk(stack, pair, coalitions, *images, 4096).run(), naive(stack, pair, coalitions, *images), atol=1e-5
    )


def test_a_layer_that_does_not_differ_is_worth_nothing(
    stack: LoraStack, pair: ParameterStack, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    same = dict(pair)
    for name in stack.players["blocks.2"]:
        same[name] = pair[name][:1].repeat(2, *[1] * (pair[name].ndim - 1))
    phi = exact_shapley(CoalitionWalk(stack, same, all_coalitions(7), *images, 4096).run().mean(1))
    assert abs(phi[2]) < 1e-7
    assert np.abs(np.delete(phi, 2)).max() > 1e-4


def test_mixing_is_bitwise_at_both_ends(stack: LoraStack, pair: ParameterStack) -> None:
    robust, benign = ({n: v[i : i + 1] for n, v in pair.items()} for i in (0, 1))
    nobody, everybody = (np.full((1, 7), end) for end in (False, True))
    assert all(torch.equal(v, robust[n]) for n, v in mix(robust, benign, nobody, stack.players).items())
    assert all(torch.equal(v, benign[n]) for n, v in mix(robust, benign, everybody, stack.players).items())


def test_architectures_without_a_chain_of_blocks_play_too() -> None:
    torch.manual_seed(0)
    section = BackboneSection(name="swin_tiny_patch4_window7_224", image_size=56)
    stack = LoraStack(create_backbone(section, 10), LoraSection(rank=2))
    pair = to_parameters(stack_states(random_states(stack, 2)), "cpu", torch.float32)
    x, y = torch.rand(N, 3, 32, 32), torch.tensor([1, 4, 7])
    coalitions = np.zeros((3, len(stack.players)), bool)
    coalitions[1, :4] = True
    coalitions[2] = True
    walked = CoalitionWalk(stack, pair, coalitions, x, y, max_stack=6).run()
    np.testing.assert_allclose(walked, naive(stack, pair, coalitions, x, y), atol=1e-5)


class TwelveBlocks:
    """A chain of twelve blocks whose output takes exactly one stack of tokens."""

    num_blocks = 12

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0

    def run_block(self, index: int, params: ParameterStack, tokens: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return tokens + params["shift"][owner, index, None, None]

    def classify(self, params: ParameterStack, tokens: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        del params, owner
        return tokens.mean(1)[:, :2]


def test_a_walk_over_twelve_blocks_keeps_at_most_fourteen_stacks_of_tokens() -> None:
    num_images, tokens, width, max_stack = 2, 50, 16, 8
    x = torch.rand(num_images, tokens, width)
    pair = {"shift": torch.stack([torch.zeros(12), torch.ones(12)])}
    coalitions = all_coalitions(13)
    walk = CoalitionWalk(TwelveBlocks(), pair, coalitions, x, torch.tensor([0, 1]), max_stack)  # type: ignore[arg-type]
    with LiveBytes() as counter:
        walk.run()
    assert walk.block_evaluations == 2**13 - 2
    stack = max_stack * tokens * width * 4
    assert counter.peak <= 14 * stack
    assert counter.peak > 4 * stack, "the walk is deep: the stack holds two coalitions of two images"


def test_images_beyond_a_stack_are_evaluated_in_turn(
    stack: LoraStack, pair: ParameterStack, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    coalitions = all_coalitions(7)[[127, 0, 3]]
    whole = CoalitionWalk(stack, pair, coalitions, *images, 4096)
    parts = CoalitionWalk(stack, pair, coalitions, *images, N - 1)
    np.testing.assert_allclose(parts.run(), whole.run(), atol=1e-5)
    assert parts.block_evaluations == whole.block_evaluations

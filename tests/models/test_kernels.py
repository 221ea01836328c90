"""Attention kernels, the patch projection and bfloat16: other ways to compute the same function."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.config.experiment import BackboneSection, ExperimentConfig, LoraSection
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.precision import at_precision
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ParameterStack, stack_states
from sylva_ray.data.datasets import load_dataset
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import CohortModel, FunctionalStack, repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack
from sylva_ray.models.patches import PatchProjection, project_patches

CLASSES = 10


def lora_stack() -> tuple[LoraStack, dict[str, torch.Tensor]]:
    """Two clients whose adapters do something."""
    stack = LoraStack(create_backbone(BackboneSection(), CLASSES), LoraSection(rank=4))
    states = [stack.initial_state(generator(0, "state", client)) for client in range(2)]
    for client, state in enumerate(states):
        for name in state:
            if name.endswith("lora_B"):
                noise = torch.randn(state[name].shape, generator=generator(0, name, client))
                state[name] = (0.02 * noise).numpy()
    return stack, to_parameters(stack_states(states), "cpu", torch.float32)


def digit_images(config: ExperimentConfig, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    split = load_dataset(config.dataset, 32, 0).train
    return torch.from_numpy(split.images[:count]).float() / 255, torch.from_numpy(split.labels[:count])


def input_gradient(
    stack: CohortModel, params: ParameterStack, x: torch.Tensor, y: torch.Tensor, owner: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    logits = stack.forward(params, leaf, owner)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, y).sum(), leaf)
    return logits.detach(), gradient


@pytest.mark.parametrize(("side", "patch"), [(32, 8), (30, 8), (32, (4, 8))], ids=["tiled", "cut off", "oblong"])
def test_a_patch_projection_is_its_convolution(side: int, patch: int | tuple[int, int]) -> None:
    convolution = nn.Conv2d(3, 5, patch, stride=patch).double()
    assert convolution.bias is not None
    inputs = [convolution.weight, convolution.bias]
    x = torch.rand(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    ours, theirs = PatchProjection.of(convolution)(x), convolution(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *inputs]) for y in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_only_tiling_patches_are_projected_and_names_stay() -> None:
    vit: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
    before = list(vit.state_dict())
    project_patches(vit)
    assert isinstance(vit.patch_embed.proj, PatchProjection)
    assert list(vit.state_dict()) == before
    overlapping = nn.Module()
    overlapping.patch_embed = nn.Module()
    overlapping.patch_embed.proj = nn.Conv2d(3, 5, 8, stride=4)
    project_patches(overlapping)
    assert isinstance(overlapping.patch_embed.proj, nn.Conv2d)
    resnet = timm.create_model("resnet18")
    project_patches(resnet)  # has none, and stays as it is


@pytest.mark.parametrize("counts", [[3, 3], [2, 5]], ids=["even", "uneven"])
@pytest.mark.parametrize("kind", [LoraStack, FunctionalStack])
def test_plain_attention_is_fused_attention(kind: type[LoraStack | FunctionalStack], counts: list[int]) -> None:
    backbone = create_backbone(BackboneSection(), CLASSES).double()
    stack = LoraStack(backbone, LoraSection(rank=4)) if kind is LoraStack else FunctionalStack(backbone)
    states = [stack.initial_state(generator(0, "state", client)) for client in range(2)]
    params = to_parameters(stack_states(states), "cpu", torch.float64)
    x = torch.rand(sum(counts), 3, 32, 32, dtype=torch.float64, generator=generator(0, "x"))
    y, owner = torch.zeros(sum(counts), dtype=torch.long), repeat_owner(counts)
    found = []
    for kernel in ("fused", "plain"):
        stack.kernels = AttentionKernels(float32=kernel)
        found.append(input_gradient(stack, params, x, y, owner))
    assert stack.num_attention_layers == 6
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_bfloat16_agrees_with_float32_on_real_images(tiny_config: ExperimentConfig) -> None:
    stack, params = lora_stack()
    x, y = digit_images(tiny_config, 60)
    owner = repeat_owner([25, 35])
    exact_logits, exact = input_gradient(stack, params, x, y, owner)
    for kernel in ("fused", "plain"):
        stack.kernels = AttentionKernels(bfloat16=kernel)
        with at_precision(stack, torch.bfloat16):
            logits, gradient = input_gradient(stack, params, x, y, owner)
        assert logits.dtype == gradient.dtype == torch.float32
        assert float((gradient.sign() == exact.sign()).float().mean()) >= 0.995
        assert float((logits - exact_logits).norm() / exact_logits.norm()) < 0.03
    assert stack.precision == torch.float32
    torch.testing.assert_close(stack.forward(params, x, owner), exact_logits, rtol=0, atol=0)


def test_adapter_gradients_in_bfloat16_point_where_float32_does(tiny_config: ExperimentConfig) -> None:
    stack, params = lora_stack()
    x, y = digit_images(tiny_config, 40)
    owner = repeat_owner([20, 20])
    found = []
    for precision in (torch.float32, torch.bfloat16):
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        with at_precision(stack, precision):
            loss = cross_entropy(stack.forward(leaves, x, owner), y).sum()
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for name, one, other in zip(params, *found, strict=True):
        assert other.dtype == torch.float32, name
        assert float(F.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.99, name


def test_the_game_in_pieces_equals_the_forward_in_bfloat16(tiny_config: ExperimentConfig) -> None:
    stack, params = lora_stack()
    x, _ = digit_images(tiny_config, 8)
    owner = repeat_owner([4, 4])
    with at_precision(stack, torch.bfloat16), torch.no_grad():
        tokens = stack.embed(x)
        assert stack.num_blocks is not None
        for block in range(stack.num_blocks):
            tokens = stack.run_block(block, params, tokens, owner)
        torch.testing.assert_close(stack.classify(params, tokens, owner), stack.forward(params, x, owner))

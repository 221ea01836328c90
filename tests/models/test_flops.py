"""FLOPs as torch counts them are those of the formula, with the adapters and the head on top."""

from __future__ import annotations

import pytest

from sylva_ray.config.experiment import BackboneSection, LoraSection
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.seeding import generator
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.flops import count_flops
from sylva_ray.models.lora import LoraStack

VITS = {
    "vit_tiny_patch16_224": (12, 192, 196, 16),
    "vit_small_patch32_224": (12, 384, 49, 32),
    "vit_micro_patch8_32": (6, 192, 16, 8),
}
"""Depth, width, patches and their side."""


def vit_flops(depth: int, width: int, num_patches: int, patch: int, mlp_ratio: float = 4.0, prefix: int = 1) -> int:
    """Return the FLOPs of a vision transformer's forward pass of one image, without head and adapters.

    Per block and token 8 d^2 for the four projections of attention, 4 T d for its two products, and 4 d times the
    hidden width for the two layers of the MLP (Dosovitskiy et al. 2021).

    Args:
        depth: number of blocks.
        width: d.
        num_patches: of an image.
        patch: their side in pixels.
        mlp_ratio: hidden width of the MLP, relative to d.
        prefix: tokens besides those of patches.
    """
    tokens = num_patches + prefix
    block = tokens * (8 * width**2 + 4 * tokens * width + 4 * mlp_ratio * width**2)
    return int(depth * block) + 2 * num_patches * width * 3 * patch**2


@pytest.mark.parametrize("name", VITS)
def test_counted_flops_are_those_of_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "vit_micro_patch8_32":
        monkeypatch.setattr("sylva_ray.models.backbone.check_available", lambda _: None)  # it has no weights any more
    stack = LoraStack(create_backbone(BackboneSection(name=name), 10), LoraSection(rank=4))
    depth, width, patches, patch = VITS[name]
    tokens = patches + 1
    adapters = depth * tokens * 2 * 4 * 16 * width  # A and B of qkv, proj, fc1 and fc2: 16 widths of rows and columns
    expected = vit_flops(depth, width, patches, patch) + adapters + 2 * 10 * width
    size = stack.image_size
    assert count_flops(stack, stack.initial_state(generator(0, "state")), size) == expected
    assert stack.kernels == AttentionKernels()


def test_a_vit_base_takes_35_gflop() -> None:
    assert vit_flops(12, 768, 196, 16) == pytest.approx(35.1e9, rel=0.01)

"""What a checkpoint knows, convolutional networks at any size, and whole models behind the cohort's seam."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sylva_ray.config.experiment import BackboneSection, LoraSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.own_code import importing_from
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ParameterStack, stack_states
from sylva_ray.models.backbone import backbone_arrays, checkpoint_classes, create_backbone
from sylva_ray.models.cohort import FunctionalStack, repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack
from sylva_ray.models.shipped import SHIPPED
from sylva_ray.models.trial import try_model


def test_a_checkpoint_says_how_many_classes_it_knows(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert checkpoint_classes(BackboneSection()) == 200
    checkpoint = SHIPPED["vit_micro"].checkpoint
    assert checkpoint_classes(BackboneSection(checkpoint=str(checkpoint))) == 200
    headless = {name: value for name, value in load_file(checkpoint).items() if not name.startswith("head")}
    save_file(headless, tmp_path / "headless.safetensors")
    assert checkpoint_classes(BackboneSection(checkpoint=str(tmp_path / "headless.safetensors"))) is None


def test_untrained_weights_know_no_class_and_the_hubs_are_named_by_timm() -> None:
    assert checkpoint_classes(BackboneSection(name="resnet18")) is None
    assert checkpoint_classes(BackboneSection(name="resnet18.a1_in1k", pretrained=True)) == 1000


@pytest.mark.parametrize("content", [None, b"not a checkpoint"], ids=["missing", "corrupt"])
def test_a_checkpoint_that_cannot_be_read_is_the_users_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        checkpoint_classes(BackboneSection(checkpoint=str(path)))


def test_a_convolutional_network_sees_the_size_it_is_told() -> None:
    backbone = create_backbone(BackboneSection(name="resnet18", image_size=64), 10)
    assert backbone.image_size == 64
    assert backbone.preprocess(torch.rand(2, 3, 32, 32)).shape == (2, 3, 64, 64)
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.fixture(scope="module")
def convolutional() -> tuple[FunctionalStack, ParameterStack]:
    """Two clients' whole ResNets, which begin alike."""
    torch.manual_seed(0)
    stack = FunctionalStack(create_backbone(BackboneSection(name="resnet18", image_size=32), 10))
    states = [stack.initial_state(generator(0, "initial state")) for _ in range(2)]
    return stack, to_parameters(stack_states(states), "cpu", torch.float32)


def test_batch_statistics_are_each_clients_own_and_move_in_training_alone(
    convolutional: tuple[FunctionalStack, ParameterStack],
) -> None:
    stack, start = convolutional
    params = {name: value.clone() for name, value in start.items()}
    statistics = [name for name in params if "running" in name]
    assert statistics
    assert not any(stack.trainable(name) for name in statistics)
    x = torch.rand(4, 3, 32, 32, generator=generator(0, "x"))
    with torch.no_grad():
        stack.forward(params, x, repeat_owner([2, 2]))
        assert all(torch.equal(params[name], start[name]) for name in params), "attacks and evaluation only read"
        with stack.training():
            stack.forward(params, x, repeat_owner([4, 0]))
    assert not stack.backbone.training
    for name, value in params.items():
        assert torch.equal(value[1], start[name][1]), "a client without images"
        if "running_mean" in name:
            assert not torch.equal(value[0], start[name][0])
        elif name not in statistics:
            assert torch.equal(value[0], start[name][0])


def test_the_backbones_own_statistics_stay(convolutional: tuple[FunctionalStack, ParameterStack]) -> None:
    stack, start = convolutional
    with stack.training(), torch.no_grad():
        stack.forward({n: v.clone() for n, v in start.items()}, torch.rand(4, 3, 32, 32), repeat_owner([2, 2]))
    own = dict(stack.backbone.model.named_buffers())
    assert all(np.array_equal(own[name].numpy(), start[name][0].numpy()) for name in own if "running" in name)


def test_a_last_batch_of_one_image_uses_the_statistics_there_are(
    convolutional: tuple[FunctionalStack, ParameterStack],
) -> None:
    """One image on maps of one pixel has no batch statistics; its neighbour in the cohort keeps training as ever."""
    stack, start = convolutional
    params = {name: value.clone() for name, value in start.items()}
    x = torch.rand(3, 3, 32, 32, generator=generator(0, "x"))
    with torch.no_grad():
        expected = stack.forward(params, x[:1], repeat_owner([1, 0]))
        with stack.training():
            logits = stack.forward(params, x, repeat_owner([1, 2]))
            assert stack.backbone.training
    torch.testing.assert_close(logits[:1], expected)
    assert all(torch.equal(params[name][0], start[name][0]) for name in params)
    assert not torch.equal(params["bn1.running_mean"][1], start["bn1.running_mean"][1])


def test_what_is_not_the_models_is_ignored(convolutional: tuple[FunctionalStack, ParameterStack]) -> None:
    """A method may keep more in a client's state, such as a head on a teacher."""
    stack, start = convolutional
    x, owner = torch.rand(2, 3, 32, 32), repeat_owner([1, 1])
    with torch.no_grad():
        extra = stack.forward(start | {"teacher_head.bias": torch.zeros(2, 3)}, x, owner)
        assert torch.equal(extra, stack.forward(start, x, owner))
    assert not stack.trainable("teacher_head.bias")


@pytest.mark.parametrize("name", ["ghostnet_050", "nest_tiny"])
def test_models_whose_default_is_to_drop_do_not(name: str) -> None:
    """Masks would come from torch's global generator: results would depend on what a process did before."""
    backbone = create_backbone(BackboneSection(name=name), 3)
    for module in backbone.modules():  # batches of two have no useful statistics
        module.train(not isinstance(module, torch.nn.modules.batchnorm._BatchNorm))
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = backbone(x), backbone(x)
    assert torch.equal(first, second)


def test_constants_that_a_model_computes_do_not_travel() -> None:
    backbone = create_backbone(BackboneSection(name="vit_micro"), 3)
    backbone.model.register_buffer("mask", torch.zeros(5), persistent=False)
    backbone.model.register_buffer("statistics", torch.zeros(5))
    state = FunctionalStack(backbone).initial_state(torch.Generator())
    assert "statistics" in state
    assert "mask" not in state


@pytest.mark.parametrize("change", ["missing", "flat", "another width", "not square"])
def test_a_checkpoint_with_other_positions_does_not_fit(change: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(SHIPPED["vit_micro"].checkpoint)
    positions = weights.pop("pos_embed")
    others = {
        "flat": positions[0].contiguous(),
        "another width": positions[..., 1:].contiguous(),
        "not square": positions[:, :-1].contiguous(),
    }
    save_file(weights | ({"pos_embed": others[change]} if change in others else {}), tmp_path / "other.safetensors")
    section = BackboneSection(name="vit_micro", checkpoint=str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="does not fit this model: 1 tensors missing or of another shape"):
        create_backbone(section, 10)


@pytest.mark.parametrize(("name", "arguments"), [("pit_ti_224", {}), ("deit3_small_patch16_224", {"img_size": 64})])
def test_positions_without_prefix_tokens_are_loaded_and_resampled(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model(name, **arguments).state_dict(), tmp_path / "weights.safetensors")
    section = BackboneSection(name=name, checkpoint=str(tmp_path / "weights.safetensors"))
    model = create_backbone(section, 10).model
    assert model.pos_embed.shape == timm.create_model(name).pos_embed.shape  # type: ignore[union-attr]


OWN = """
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

def sized(kwargs):
    return dict(patch_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=kwargs["num_classes"])


@timm.models.register_model
def headstrong(pretrained=False, **kwargs):
    model = VisionTransformer(**sized(kwargs))
    model.head = torch.nn.Linear(16, kwargs["num_classes"], bias=False)
    return model


@timm.models.register_model
def fixed_positions(pretrained=False, **kwargs):
    model = VisionTransformer(**sized(kwargs))
    model.pos_embed.requires_grad_(False)
    return model


@timm.models.register_model
def with_unused_token(pretrained=False, **kwargs):
    model = VisionTransformer(**sized(kwargs))
    model.mask_token = torch.nn.Parameter(torch.zeros(16))
    return model


class Skipping(VisionTransformer):
    def forward_features(self, x):
        tokens = super().forward_features(x)
        return tokens + tokens.mean(1, keepdim=True)


@timm.models.register_model
def skipping(pretrained=False, **kwargs):
    return Skipping(**sized(kwargs))
"""


@pytest.fixture
def own_models(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "unusual_models.py").write_text(OWN)
    with importing_from([tmp_path]):
        yield


@pytest.mark.usefixtures("own_models")
def test_a_classifier_without_a_bias_is_refused() -> None:
    with pytest.raises(UserError, match="needs a model whose classifier has a bias"):
        create_backbone(BackboneSection(name="unusual_models:headstrong"), 3)


@pytest.mark.usefixtures("own_models")
def test_what_an_architecture_has_frozen_is_not_trained_and_what_it_does_not_use_is_named() -> None:
    section = BackboneSection(name="unusual_models:fixed_positions")
    stack = FunctionalStack(create_backbone(section, 3))
    state = stack.initial_state(generator(0, "head"))
    assert "pos_embed" in state
    assert not stack.trainable("pos_embed")
    assert stack.trainable("cls_token")
    weights = backbone_arrays(stack.backbone)
    try_model(stack, state, 8, section, LoraSection(), weights)
    section = BackboneSection(name="unusual_models:with_unused_token")
    stack = FunctionalStack(create_backbone(section, 3))
    with pytest.raises(UserError, match="does not use its parameter mask_token"):
        try_model(stack, stack.initial_state(generator(0, "head")), 8, section, LoraSection(), weights)


@pytest.mark.usefixtures("own_models")
def test_a_subclass_with_a_forward_pass_of_its_own_is_not_taken_to_pieces() -> None:
    lora = LoraSection(target_modules=["qkv"])
    plain, own = (
        LoraStack(create_backbone(BackboneSection(name=f"unusual_models:{name}"), 3), lora)
        for name in ("fixed_positions", "skipping")
    )
    assert plain.num_blocks == 2
    assert own.num_blocks is None

"""One small model of every timm family with attention: docs/backbones.md says what works, and this tries it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from sylva_ray.config.experiment import BackboneSection, ExperimentConfig, LoraSection
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import stack_states
from sylva_ray.models import trial
from sylva_ray.models.backbone import backbone_arrays, create_backbone
from sylva_ray.models.cohort import repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack, adapter_layout
from sylva_ray.models.peft_format import save_adapter
from sylva_ray.models.trial import try_model
from sylva_ray.preparation.experiment import prepare
from tests.conftest import TINY

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
ROW = re.compile(r"^\| ([^|]+) \| `([^|]+)` \| `([^|]+)` \| ([^|]+) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text())
QUICK = ("edgenext_xx_small", "mobilevit_xxs", "pvt_v2_b0")
"""Small ones of three kinds: channel attention, unfolded patches, reduced keys."""


def attempt(name: str, targets: str, image_size: int = 32) -> None:
    section, lora = BackboneSection(name=name), LoraSection(rank=2, target_modules=tuple(re.split(", *", targets)))
    backbone = create_backbone(section, num_classes=5)
    weights = backbone_arrays(backbone)
    stack = LoraStack(backbone, lora)
    try_model(stack, stack.initial_state(generator(0, "initial state")), image_size, section, lora, weights)


@pytest.mark.parametrize(
    ("name", "targets", "result"),
    [
        pytest.param(name, targets, result, marks=[] if name in QUICK else pytest.mark.slow, id=f"{name}-{targets}")
        for _, name, targets, result in ROWS
    ],
)
def test_what_the_page_says_is_true(name: str, targets: str, result: str) -> None:
    if result == "works":
        attempt(name, targets)
    else:
        with pytest.raises(UserError) as caught:
            attempt(name, targets)
        assert result in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_page_has_every_family_that_crashed_before() -> None:
    assert len(ROWS) > 45
    assert {"beit", "swin_transformer_v2", "eva", "volo"} <= {family for family, *_ in ROWS}


def test_prepare_refuses_a_model_before_anything_is_written() -> None:
    raw = TINY | {"backbone": {"name": "eva02_tiny_patch14_224", "image_size": 28}}
    with pytest.raises(UserError) as caught:
        prepare(build(ExperimentConfig, raw))
    assert (caught.value.key, caught.value.value) == ("lora.target_modules", "blocks.0.attn.qkv")


class MixesImages(torch.nn.Module):
    """An attention that adds the mean over the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.mean(0, keepdim=True)


def test_a_model_that_mixes_images_cannot_be_stacked() -> None:
    section, lora = BackboneSection(name="pvt_v2_b0"), LoraSection(rank=2, target_modules=("attn.q",))
    backbone = create_backbone(section, num_classes=5)
    backbone.model.set_submodule("stages.0.norm", MixesImages())
    stack = LoraStack(backbone, lora)
    state = stack.initial_state(generator(0, "initial state"))
    with pytest.raises(UserError, match="mixes the images of a batch"):
        try_model(stack, state, 32, section, lora, {})


def test_an_export_that_peft_computes_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    save = save_adapter

    def half(state, *arguments):  # type: ignore[no-untyped-def]
        save({name: value / 2 if name.endswith("lora_B") else value for name, value in state.items()}, *arguments)

    monkeypatch.setattr(trial, "save_adapter", half)
    with pytest.raises(UserError, match="do not give the same logits in PEFT"):
        attempt("pvt_v2_b0", "attn.q, attn.proj")


class Unused(torch.nn.Module):
    """A block with a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_an_adapter_that_is_never_used_is_refused() -> None:
    section, lora = BackboneSection(name="pvt_v2_b0"), LoraSection(rank=2, target_modules=("attn.q", "spare"))
    backbone = create_backbone(section, num_classes=5)
    backbone.model.set_submodule(
        "stages.0.norm", torch.nn.Sequential(backbone.model.get_submodule("stages.0.norm"), Unused())
    )
    stack = LoraStack(backbone, lora)
    with pytest.raises(UserError, match=r"does not use stages.0.norm.1.spare, so an adapter there has no effect"):
        try_model(stack, stack.initial_state(generator(0, "initial state")), 32, section, lora, {})


def test_weights_from_nowhere_are_the_same_in_every_command() -> None:
    """A notebook runs and evaluates in one process: the second model must be the first."""
    first = create_backbone(BackboneSection(name="pvt_v2_b0"), 5)
    torch.rand(1)  # whatever is drawn in between
    second = create_backbone(BackboneSection(name="pvt_v2_b0"), 5)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_loaded_export_of_volo_has_both_of_its_heads(tmp_path: Path) -> None:
    """A timm model of one's own has another ``aux_head``, which counts in its logits: the file replaces both."""
    section, lora = BackboneSection(name="volo_d1_224"), LoraSection(rank=2)
    backbone = create_backbone(section, num_classes=5)
    stack = LoraStack(create_backbone(section, num_classes=5), lora)
    state = stack.initial_state(generator(0, "initial state"))
    save_adapter(state, tmp_path, section, lora, adapter_layout(backbone, lora))
    with torch.no_grad():
        backbone.model.aux_head.weight.normal_()  # type: ignore[union-attr, operator]
        x = torch.rand(2, 3, 32, 32)
        loaded = PeftModel.from_pretrained(backbone.model, str(tmp_path)).eval()
        expected = stack.forward(to_parameters(stack_states([state]), "cpu", torch.float32), x, repeat_owner([2]))
        torch.testing.assert_close(loaded(backbone.preprocess(x)), expected, rtol=0, atol=1e-4)


def test_no_target_at_all_is_refused_by_the_configuration() -> None:
    with pytest.raises(UserError) as caught:
        build(ExperimentConfig, {"lora": {"target_modules": []}})
    assert str(caught.value) == "lora.target_modules = []: must have at least 1 item"


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002"])  # whose heads are fc and head.fc
def test_a_model_without_linear_layers_says_so(name: str) -> None:
    with pytest.raises(UserError, match="this model has no linear layer but its head"):
        attempt(name, "attn.qkv")

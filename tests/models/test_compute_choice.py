"""Which precision and kernel a run takes: what is faster by a margin, once, and the same again on resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from sylva_ray.config.experiment import BackboneSection, ExperimentConfig, LoraSection
from sylva_ray.config.schema import build
from sylva_ray.config.stored import load_run_config
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import stack_states
from sylva_ray.models import compute_choice
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import FunctionalStack, to_parameters
from sylva_ray.models.compute_choice import ComputeChoice, can_run, fastest
from sylva_ray.models.lora import LoraStack
from sylva_ray.preparation import resolve
from sylva_ray.preparation.experiment import prepare
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY

AUTO = TINY | {
    "training": {"rounds": 1, "batch_size": 16},
    "evaluation": {"attacks": []},
    "algorithm": {"name": "sylva", "phase2": {"enabled": False}},
}
BF16_PLAIN = ComputeChoice(
    "bfloat16", AttentionKernels(bfloat16="plain"), {("float32", "fused"): 2.0, ("bfloat16", "plain"): 1.0}
)


def chosen(
    monkeypatch: pytest.MonkeyPatch, times: Mapping[tuple[str, str], float], pinned: AttentionKernels | None = None
) -> ComputeChoice:
    """The choice where a step takes ``times``; the model cannot run in what is missing."""
    model = LoraStack(create_backbone(BackboneSection(), 3), LoraSection(rank=1))
    monkeypatch.setattr(compute_choice, "_step_milliseconds", lambda *given: times.get(given[4]))
    params = {n: torch.from_numpy(v) for n, v in stack_states([model.initial_state(generator(0, "s"))]).items()}
    return fastest(model, params, 32, torch.device("cpu"), 1, pinned)


NAMES = (("float32", "fused"), ("float32", "plain"), ("bfloat16", "fused"), ("bfloat16", "plain"))


@pytest.mark.parametrize(
    ("times", "precision", "kernels"),
    [
        ((250, 255, 250, 100), "bfloat16", ("fused", "plain")),  # a CPU with AMX
        ((250, 255, 700, 600), "float32", ("fused", "plain")),  # one that emulates bfloat16
        ((250, 240, 240, 230), "float32", ("fused", "fused")),  # differences that a second measurement may turn round
        ((100, 60, 90, 40), "bfloat16", ("plain", "plain")),
        ((10, 12, 4, 5), "bfloat16", ("fused", "fused")),  # a GPU
    ],
)
def test_a_choice_needs_a_margin(
    monkeypatch: pytest.MonkeyPatch, times: tuple[float, ...], precision: str, kernels: tuple[str, str]
) -> None:
    choice = chosen(monkeypatch, dict(zip(NAMES, times, strict=True)))
    assert (choice.precision, choice.attention.float32, choice.attention.bfloat16) == (precision, *kernels)


def test_precisions_are_compared_at_the_kernels_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is fast with plain attention only; with fused attention it must not be chosen."""
    times = dict(zip(NAMES, (250, 255, 300, 100), strict=True))
    fused = AttentionKernels(float32="fused", bfloat16="fused")
    choice = chosen(monkeypatch, times, fused)
    assert (choice.precision, choice.attention) == ("float32", fused)
    assert ("bfloat16", "plain") not in choice.milliseconds
    assert chosen(monkeypatch, times, AttentionKernels(bfloat16="plain")).precision == "bfloat16"


def test_a_model_that_cannot_run_in_bfloat16_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, {("float32", "fused"): 2.0, ("float32", "plain"): 2.0})
    assert choice.precision == "float32"
    assert {precision for precision, _ in choice.milliseconds} == {"float32"}


def test_what_is_hopeless_is_timed_with_few_images_and_a_slow_first_step_decides_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 is emulated in one kernel; in the other it is the fastest once its code is compiled."""
    per_image = dict(zip(NAMES, (1.0, 1.1, 14.0, 0.5), strict=True))
    sizes: dict[tuple[str, str], list[int]] = {name: [] for name in NAMES}

    def step(_: object, __: object, x: torch.Tensor, ___: object, alternative: tuple[str, str], *____: object) -> float:
        sizes[alternative].append(len(x))
        compiles = alternative == ("bfloat16", "plain") and len(sizes[alternative]) == 1
        return 50.0 if compiles else len(x) * per_image[alternative]

    model = LoraStack(create_backbone(BackboneSection(), 3), LoraSection(rank=1))
    monkeypatch.setattr(compute_choice, "_step_milliseconds", step)
    params = {n: torch.from_numpy(v) for n, v in stack_states([model.initial_state(generator(0, "s"))]).items()}
    choice = fastest(model, params, 32, torch.device("cpu"), 1)
    assert sizes == {name: [2, 2] + [32] * (0 if name == ("bfloat16", "fused") else 4) for name in NAMES}
    assert (choice.precision, choice.attention.bfloat16) == ("bfloat16", "plain")
    assert choice.milliseconds["bfloat16", "fused"] == 32 * 14.0


@pytest.mark.parametrize(
    ("name", "full", "size"),
    [
        ("xcit_nano_12_p16_224", False, 32),  # its patch embedding returns a tuple
        ("vit_tiny_r_s16_p8_224", True, 32),  # its projection follows a convolutional stem
        ("resnet18", True, 32),  # no attention
        ("swin_tiny_patch4_window7_224", False, 64),
    ],
)
def test_other_architectures_run_in_bfloat16(name: str, full: bool, size: int) -> None:
    backbone = create_backbone(BackboneSection(name=name, image_size=None if "xcit" in name else size), 3)
    model = (
        FunctionalStack(backbone) if full else LoraStack(backbone, LoraSection(rank=1, target_modules=("attn.proj",)))
    )
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    params = to_parameters(stack_states([model.initial_state(generator(0, "s"))]), "cpu", torch.float32)
    for alternative in (("float32", "fused"), ("bfloat16", "fused"), ("bfloat16", "plain")):
        assert can_run(model, params, size, torch.device("cpu"), alternative)
    after = backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_real_measurement_is_complete_and_leaves_the_threads() -> None:
    model = LoraStack(create_backbone(BackboneSection(), 3), LoraSection(rank=1))
    params = {n: torch.from_numpy(v) for n, v in stack_states([model.initial_state(generator(0, "s"))]).items()}
    choice = fastest(model, params, 32, torch.device("cpu"), 2)
    assert torch.get_num_threads() == 1
    assert len(choice.milliseconds) == 4
    assert all(0 < ms < math.inf for ms in choice.milliseconds.values())


def test_nothing_is_auto_after_prepare_and_a_resume_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resolve, "fastest", lambda *_: BF16_PLAIN)
    config = build(ExperimentConfig, AUTO)
    first = prepare(config).config
    assert (first.training.precision, first.evaluation.precision) == ("bfloat16", "bfloat16")
    assert first.training.attention == AttentionKernels(float32="fused", bfloat16="plain")
    RunFolder(tmp_path).claim(first, resume=False)
    assert load_run_config(tmp_path).to_yaml() == first.to_yaml()
    monkeypatch.setattr(resolve, "fastest", lambda *_: pytest.fail("measured again"))
    again = prepare(config, RunFolder(tmp_path)).config
    RunFolder(tmp_path).claim(again, resume=True)
    assert again == first


def test_what_is_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "fastest", lambda *_: pytest.fail("measured"))
    training = AUTO["training"] | {"precision": "float32", "attention": "plain"}
    raw = AUTO | {"training": training, "evaluation": {"attacks": [], "precision": "float32"}}
    config = prepare(build(ExperimentConfig, raw)).config
    assert config.training.attention == AttentionKernels(float32="plain", bfloat16="plain")


def test_bfloat16_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_choice, "_step_milliseconds", lambda *_, **__: None)
    raw = AUTO | {"training": AUTO["training"] | {"precision": "bfloat16"}}
    with pytest.raises(UserError, match=r"training\.precision.*bfloat16.*float32 or auto"):
        prepare(build(ExperimentConfig, raw))


def test_a_run_folder_of_version_0_1_goes_on_as_it_began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It does not say which kernel; there was one."""
    monkeypatch.setattr(resolve, "fastest", lambda *_: BF16_PLAIN)
    raw = AUTO | {"training": AUTO["training"] | {"precision": "float32"}}
    resolved = prepare(build(ExperimentConfig, raw)).config
    text = resolved.to_yaml().splitlines()
    start = text.index("  attention:")
    old = [*text[:start], *text[start + 3 :]]
    old.remove("  precision: bfloat16")  # the evaluation's
    (tmp_path / "config.yaml").write_text("\n".join(old) + "\n")
    config = prepare(load_run_config(tmp_path), RunFolder(tmp_path)).config
    assert config.training.attention == AttentionKernels()
    assert (config.training.precision, config.evaluation.precision) == ("float32", "float32")
    RunFolder(tmp_path).claim(config, resume=True)


def test_an_alternative_that_does_not_fit_the_memory_is_not_chosen() -> None:
    class Full:
        """A model on a card that is full, as the CUDA runtime says it."""

        def forward(self, *_: object) -> torch.Tensor:
            raise torch.AcceleratorError("CUDA error: out of memory")

    x, owner = torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)
    assert compute_choice._step_milliseconds(Full(), {}, x, owner, ("float32", "fused"), 1) is None  # type: ignore[arg-type]

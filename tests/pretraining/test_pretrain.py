"""Pre-training: resumed equals uninterrupted, the mixes are what they claim, the result loads as a backbone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sylva_ray.config.data import DatasetSection
from sylva_ray.config.experiment import BackboneSection
from sylva_ray.config.schema import build
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.seeding import generator
from sylva_ray.data.datasets import load_dataset
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.compute_choice import ComputeChoice
from sylva_ray.models.shipped import SHIPPED
from sylva_ray.pretraining import resolve
from sylva_ray.pretraining import trainer as module
from sylva_ray.pretraining.augment import mixed, resized_crops
from sylva_ray.pretraining.config import PretrainConfig
from sylva_ray.pretraining.trainer import EpochRecord, pretrain, top1
from tests.preparation.test_inputs import draw_images
from tests.storage.conftest import contents

pytestmark = pytest.mark.long


def config(**training: Any) -> PretrainConfig:
    recipe = {"epochs": 2, "batch_size": 40, "threads": 1, "warmup_epochs": 0.5}
    recipe |= {"precision": "float32", "attention": "fused"} | training
    dataset = {"name": "digits", "max_train": 80, "max_test": 40}
    return build(PretrainConfig, {"dataset": dataset, "training": recipe, "seed": 3})


def test_resumed_equals_uninterrupted_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(config(), tmp_path / "whole", False, lambda _: None)
    epoch = module._Trainer.epoch

    def dies(self: module._Trainer, number: int) -> float:
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number)

    monkeypatch.setattr(module._Trainer, "epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(), tmp_path / "cut", False, lambda _: None)
    monkeypatch.setattr(module._Trainer, "epoch", epoch)
    seen: list[EpochRecord] = []
    resumed = pretrain(config(), tmp_path / "cut", True, seen.append)
    assert [record.epoch for record in seen] == [2]
    assert whole.read_bytes() == resumed.read_bytes()
    section = config().backbone.model_copy(update={"checkpoint": str(resumed)})
    assert create_backbone(section, 10)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    card = (tmp_path / "cut" / "model_card.md").read_text()
    assert "Top-1" in card
    assert "digits" in card


def test_a_resumed_pretraining_computes_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = ComputeChoice("bfloat16", AttentionKernels(bfloat16="plain"), {})
    monkeypatch.setattr(resolve, "fastest", lambda *_: choice)
    unset = config(epochs=1, precision="auto", attention="auto")
    pretrain(unset, tmp_path / "run", False, lambda _: None)
    monkeypatch.setattr(resolve, "fastest", lambda *_: pytest.fail("measured again"))
    pretrain(unset, tmp_path / "run", True, lambda _: None)
    begun = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert (begun["precision"], begun["attention"]) == ("bfloat16", "plain")


def stop_at(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the next pre-training before an epoch, counted from 0."""
    compute = module._Trainer.epoch

    def stops(self: module._Trainer, number: int) -> float:
        if number == epoch:
            monkeypatch.setattr(module._Trainer, "epoch", compute)
            raise KeyboardInterrupt
        return compute(self, number)

    monkeypatch.setattr(module._Trainer, "epoch", stops)


def interrupted(settings: PretrainConfig, out: Path, epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(epoch, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings, out, False, lambda _: None)


@pytest.mark.parametrize(
    "name",
    [
        module.WEIGHTS,
        pytest.param(module.OPTIMIZER, marks=pytest.mark.slow),
        pytest.param(module.PROGRESS, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_computed_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(config(epochs=3), tmp_path / "whole", False, lambda _: None)
    interrupted(config(epochs=3), tmp_path / "cut", 2, monkeypatch)
    damaged = tmp_path / "cut" / "checkpoint" / "epoch_0001" / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    seen: list[EpochRecord] = []
    resumed = pretrain(config(epochs=3), tmp_path / "cut", True, seen.append)
    assert [record.epoch for record in seen] == [2, 3]
    assert whole.read_bytes() == resumed.read_bytes()
    assert [json.loads(line)["epoch"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_a_pretraining_whose_checkpoints_are_all_damaged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(config(), tmp_path / "cut", 1, monkeypatch)
    (tmp_path / "cut" / "checkpoint" / "epoch_0000" / module.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="none can be used"):
        pretrain(config(), tmp_path / "cut", True, lambda _: None)


def test_changed_images_are_refused_or_said_in_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_images(tmp_path / "images", 20)
    settings = config(batch_size=8).model_copy(
        update={"dataset": DatasetSection(name=f"imagefolder:{tmp_path}/images")}
    )
    interrupted(settings, tmp_path / "run", 1, monkeypatch)
    draw_images(tmp_path / "images", 5, seed=1)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"the training images and the test images of imagefolder:.*--allow-changed"):
        pretrain(settings, tmp_path / "run", True, lambda _: None)
    assert contents(tmp_path / "run") == before
    notices: list[str] = []
    pretrain(settings, tmp_path / "run", True, lambda _: None, notices.append, allow_changed=True)
    assert any("(--allow-changed)" in text for text in notices)
    card = (tmp_path / "run" / "model_card.md").read_text()
    assert "* Since epoch 2, the training images and the test images of imagefolder:" in card


def test_other_initial_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "start.safetensors"
    weights = load_file(SHIPPED["vit_micro"].checkpoint)
    save_file(weights, path)
    backbone = BackboneSection(checkpoint=str(path))
    settings = config().model_copy(update={"init": "backbone", "backbone": backbone})
    interrupted(settings, tmp_path / "run", 1, monkeypatch)
    save_file(weights | {"norm.bias": weights["norm.bias"] + 1}, path)
    with pytest.raises(UserError, match=r"the weights of the backbone .* are not those of the pre-training"):
        pretrain(settings, tmp_path / "run", True, lambda _: None)


def test_a_finished_pretraining_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = pretrain(config(), tmp_path / "run", False, lambda _: None)
    before = contents(tmp_path / "run")
    monkeypatch.setattr(module, "load_dataset", lambda *_: pytest.fail("loaded"))
    assert pretrain(config(), tmp_path / "run", True, lambda _: None) == done
    with pytest.raises(UserError, match="another config"):
        pretrain(config(epochs=3), tmp_path / "run", True, lambda _: None)
    assert contents(tmp_path / "run") == before


def test_a_pretraining_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"lower training\.lr"):
        pretrain(config(lr=1e30), tmp_path / "run", False, lambda _: None)
    assert not (tmp_path / "run" / "backbone.safetensors").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"training": {"epochs": "x"}}'])
def test_a_damaged_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        pretrain(config(), tmp_path, True, lambda _: None)


@pytest.mark.slow
def test_it_learns_something_adversarially_too(tmp_path: Path) -> None:
    records: list[EpochRecord] = []
    settings = build(
        PretrainConfig,
        {
            "dataset": {"name": "digits", "max_train": 200, "max_test": 100},
            "init": "backbone",
            "adversarial": True,
            "attack": {"epsilon": "2/255", "steps": 1},
            "training": {
                "epochs": 6,
                "batch_size": 20,
                "threads": 1,
                "augment": "none",
                "mixup": 0,
                "cutmix": 0,
                "warmup_epochs": 0,
            },
        },
    )
    pretrain(settings, tmp_path / "p", False, records.append)
    assert records[-1].loss < records[0].loss
    assert records[-1].top1 > 0.25


def test_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("")
    with pytest.raises(UserError, match="not empty"):
        pretrain(config(), tmp_path / "x", False, lambda _: None)
    with pytest.raises(UserError, match="no pre-training"):
        pretrain(config(), tmp_path / "none", True, lambda _: None)


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_targets_follow_the_ratio_of_pixels(mixup: float, cutmix: float) -> None:
    """Image i is constant i: what its mixture's mean says must be what its target says."""
    n = 8
    x = torch.arange(n).view(n, 1, 1, 1).expand(n, 3, 16, 16) / n
    target = torch.eye(n)
    for seed in range(20):
        blended, soft = mixed(x, target, mixup, cutmix, generator(seed, "mix"))
        torch.testing.assert_close(soft.sum(1), torch.ones(n))
        torch.testing.assert_close(blended.mean((1, 2, 3)), (soft * torch.arange(n) / n).sum(1), rtol=0, atol=1e-5)


def test_resized_crops_of_the_whole_area_change_little_and_stay_in_range() -> None:
    x = torch.rand(16, 3, 32, 32)
    crops = resized_crops(x, 0.1, generator(0, "crop"))
    assert crops.shape == x.shape
    assert crops.min() >= 0
    assert crops.max() <= 1
    assert not torch.allclose(crops, x)
    gradient = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    assert (resized_crops(gradient, 0.2, generator(1, "crop")).diff(dim=-1) >= -1e-6).all()  # crops do not mirror


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_is_small_half_precision_and_knows_its_classes(name: str) -> None:
    shipped = SHIPPED[name]
    weights = load_file(shipped.checkpoint)
    assert shipped.checkpoint.stat().st_size <= 6e6
    assert all(value.dtype == torch.float16 for value in weights.values())
    assert weights["head.weight"].shape == (200, 192)
    assert shipped.card.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_micro", "vit_micro_robust"])
def test_a_shipped_checkpoint_has_the_accuracy_of_its_card(name: str, tiny_imagenet: DatasetSection) -> None:
    """On all 10,000 validation images: other statistics of the pixels would cost it 2 points or more."""
    stated = re.search(r"^\* Top-1 .*: ([\d.]+) %", SHIPPED[name].card.read_text(), re.MULTILINE)
    assert stated is not None
    dataset = load_dataset(tiny_imagenet, 32, 0)
    accuracy = top1(create_backbone(BackboneSection(name=name), 200), dataset.test, torch.device("cpu"))
    assert 100 * accuracy == pytest.approx(float(stated[1]), abs=0.15)


@pytest.fixture
def tiny_imagenet() -> DatasetSection:
    from pathlib import Path

    from sylva_ray.config.data import DatasetSection

    folder = Path(__file__).parents[2] / "../shared/data/tiny-imagenet-32"
    if not folder.is_dir():
        pytest.skip("the Tiny-ImageNet-32 parquet is not beside the checkout")
    return DatasetSection(name=f"parquet:{folder}", max_train=200)


@pytest.mark.parametrize(("name", "depends_on_seed"), [("convnext_atto", False), ("resnet10t", True)])
def test_any_model_of_timm_starts_from_random_weights(name: str, depends_on_seed: bool) -> None:
    """One of them has no ``init_weights``."""
    settings = config().model_copy(update={"backbone": BackboneSection(name=name)})

    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return module._initial_backbone(settings, 10).state_dict()

    first, second, other = start(0), start(0), start(1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first) == depends_on_seed


def test_a_count_of_batches_is_not_a_weight_in_half_precision() -> None:
    assert module._in_half(torch.tensor(70_000)).item() == 70_000
    assert module._in_half(torch.tensor(0.1)).dtype == torch.float16

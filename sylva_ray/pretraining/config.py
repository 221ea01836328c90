"""The configuration of a pre-training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from sylva_ray.config.data import DatasetSection
from sylva_ray.config.experiment import BackboneSection
from sylva_ray.config.schema import build, read_overridden
from sylva_ray.config.training import AttackSection
from sylva_ray.core.bounds import MAX_COUNT
from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import Count, Section, Seed
from sylva_ray.storage.reading import read_json

PRETRAIN_CONFIG = "config.json"
"""The resolved configuration in the folder of a pre-training."""


class PretrainTraining(Section):
    """The training recipe. ``mixup`` and ``cutmix`` are the alphas of their Beta distributions; 0 turns one off."""

    epochs: Count = 100
    batch_size: int = Field(256, ge=2, le=MAX_COUNT)
    lr: float = Field(1e-3, gt=0)
    warmup_epochs: float = Field(5.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(0.2, ge=0)
    cutmix: float = Field(1.0, ge=0)
    augment: Literal["none", "flip", "flip_crop", "resized_crop"] = Field(
        "resized_crop", description="the last one flips too"
    )
    crop_scale: float = Field(0.3, gt=0, le=1, description="smallest area of a resized crop")
    clip_norm: float = Field(1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: whichever is faster here")
    attention: Literal["auto", "fused", "plain"] = Field(
        "auto", description="the kernel; auto: whichever is faster here"
    )
    threads: Count = 2
    device: Literal["cpu", "cuda", "auto"] = "auto"


class PretrainConfig(Section):
    """A pre-training run.

    ``init`` starts from random weights, or from those that ``backbone`` names. ``adversarial`` trains on PGD images of
    ``attack``.
    """

    seed: Seed = 0
    init: Literal["scratch", "backbone"] = "scratch"
    dataset: DatasetSection
    backbone: BackboneSection = BackboneSection()
    adversarial: bool = False
    attack: AttackSection = AttackSection(epsilon=4 / 255, steps=2)
    training: PretrainTraining = PretrainTraining()


class ResolvedPretrainTraining(PretrainTraining):
    """The training recipe with a precision and an attention kernel."""

    precision: Literal["float32", "bfloat16"]
    attention: Literal["fused", "plain"]


class ResolvedPretrainConfig(PretrainConfig):
    """A pre-training run in which the precision and the attention kernel are decided."""

    training: ResolvedPretrainTraining


def load_pretrain_config(path: str | Path, overrides: Sequence[str]) -> PretrainConfig:
    """Read a YAML file and apply ``KEY=VALUE`` overrides.

    Raises:
        UserError: see `sylva_ray.config.experiment.load_config`.
    """
    return build(PretrainConfig, read_overridden(path, overrides))


def load_resolved(out: Path) -> ResolvedPretrainConfig:
    """Load the configuration that the pre-training in ``out`` was started with.

    Raises:
        UserError: it is not one.
    """
    raw = read_json(out / PRETRAIN_CONFIG, "config", "it is damaged; start again with another --out")
    if not isinstance(raw, dict) or not isinstance(raw.get("training"), dict):
        raise UserError("config", str(out / PRETRAIN_CONFIG), "is not the configuration of a pre-training")
    raw["training"] = {"attention": "fused"} | raw["training"]  # version 0.1 had no other kernel
    return build(ResolvedPretrainConfig, raw)

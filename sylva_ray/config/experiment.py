"""The configuration of an experiment: frozen sections, read from YAML, with ``KEY=VALUE`` overrides.

Unknown keys are rejected and values are checked at construction. Every ``auto`` is resolved before the first round, so
that the ``config.yaml`` of a run folder contains the values that were used. Epsilons are in pixel units [0, 1] and may
be written as fractions: 8/255.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from sylva_ray.attacks.byzantine import BYZANTINE_ATTACKS
from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.config.attacks import EvaluationAttack
from sylva_ray.config.cluster import ClusterSection
from sylva_ray.config.data import DatasetSection, PartitionSection, stored_dataset
from sylva_ray.config.schema import RawConfig, build, flatten, read_overridden
from sylva_ray.config.tracking import TrackingSection
from sylva_ray.config.training import AttackSection, TrainingSection
from sylva_ray.core.locations import StoredPath, stored_path
from sylva_ray.core.sections import Count, Name, PlainValue, Section, Seed, conflict
from sylva_ray.core.types import AttackSpec
from sylva_ray.core.yaml import to_yaml

DEFAULT_BACKBONE = "vit_micro"
"""One of the backbones whose weights are part of this package (`sylva_ray.models.shipped`)."""

ALL_LINEAR = "all_linear"
"""In ``lora.target_modules``: every linear layer of every block, as PEFT's ``all-linear``, but never a classifier."""


class AlgorithmSection(Section):
    """The method: its name, or ``package.module:Class``. All other keys are parameters of the method."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, PlainValue]
    name: str = Field("sylva", description="the method, see `sylva-ray list methods`, or package.module:Class")

    @property
    def parameters(self) -> RawConfig:
        """All keys but the name; they are validated by the ``Parameters`` of the method."""
        return dict(self.model_extra or {})


class BackboneSection(Section):
    """A timm model. Its weights are those of the hub (`pretrained`), of a `checkpoint`, or those in this package.

    A model of your own is ``package.module:function``, where the function is registered with timm.
    """

    name: str = Field(
        DEFAULT_BACKBONE,
        description="a timm model with a linear classifier, see `sylva-ray list backbones`, or package.module:function",
    )
    pretrained: bool = Field(
        False, description="true: fetch timm's weights from the hub, where they are not on this machine"
    )
    checkpoint: StoredPath | None = Field(None, description="safetensors file of the timm model's state_dict")
    image_size: int | None = Field(
        None, ge=8, le=4096, description="side of the input in pixels; None: that of the model"
    )


class LoraSection(Section):
    """LoRA on linear layers, scaled by alpha / rank (Hu et al. 2022)."""

    rank: Count = Field(8, description="rank r of the update B A of a layer")
    alpha: float = Field(16.0, gt=0, description="scale: the update is multiplied by alpha / rank")
    target_modules: tuple[str, ...] = Field(
        ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        min_length=1,
        description="names of layers or ends of names; all_linear: the linear layers of all blocks",
    )
    train_norms: bool = Field(
        False, description="also train the layer norms of all blocks; they are shared like the adapters"
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_linear_needs_no_list(cls, value: object) -> object:
        if isinstance(value, str) and value != ALL_LINEAR:
            raise ValueError(f"must be a list, e.g. [attn.qkv, attn.proj], or {ALL_LINEAR}")
        return (value,) if value == ALL_LINEAR else value


class EvaluationSection(Section):
    """What is measured. The last round of each phase is always evaluated with all attacks and images."""

    every: int = Field(
        0, ge=0, description="n: also after stages 0, n, 2n, ..., with the first attack; 0: only at the end of phases"
    )
    initial: bool = Field(True, description="also before phase 1, in full; tables then have a column *before*")
    attacks: tuple[EvaluationAttack, ...] = Field(
        (PgdAttack(),),
        description="each is run at the ends of phases, e.g. [{name: pgd, epsilon: 8/255, steps: 20}]; see "
        "`sylva-ray list attacks`",
    )
    max_samples: Count | None = Field(
        None, description="test images per client in evaluations between the ends of phases"
    )
    clients: Count | None = Field(
        None, description="clients in these evaluations, always the same, drawn from the seed; None: all"
    )
    checks: bool = Field(True, description="run the checks S4 (unbounded attack) and S14 (collapse)")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of attacks in evaluation, guard and game; predictions and successes are always those of float32",
    )

    @model_validator(mode="after")
    def _unique_labels(self) -> EvaluationSection:
        labels = [attack.spec().label for attack in self.attacks]
        for label in labels:
            if labels.count(label) > 1:
                raise conflict("attacks", label, "is listed twice")
        return self

    @property
    def specs(self) -> tuple[AttackSpec, ...]:
        """All attacks as `AttackSpec`."""
        return tuple(attack.spec() for attack in self.attacks)


class ByzantineSection(Section):
    """Byzantine clients, which are drawn from the seed. Reported accuracies are those of the other clients."""

    fraction: float = Field(0.0, ge=0, lt=1, description="of the clients, rounded down")
    attack: Literal["sign_flip", "gaussian", "label_flip", "alie", "ipm", "mimic", "nan"] = Field(
        "sign_flip", description="what malicious clients do"
    )
    strength: float | None = Field(
        None, gt=0, description="of sign_flip, gaussian, alie (z) and ipm; None: the default of the attack"
    )

    @model_validator(mode="after")
    def _strength_has_an_effect(self) -> ByzantineSection:
        if self.strength is not None and not BYZANTINE_ATTACKS[self.attack].takes_strength:
            raise conflict("strength", self.strength, f"has no effect on {self.attack}: leave it out")
        return self


class CompressionSection(Section):
    """Compression of updates; available for all methods."""

    kind: Literal["none", "int8", "int4", "topk"] = Field("none", description="codec of what travels")
    fraction: float = Field(0.05, gt=0, le=1, description="fraction of the entries that topk keeps")
    error_feedback: bool = Field(
        True,
        description="add the compression error of an upload to the next one, but not that of factors which merging "
        "rewrites (`factor_rule=product_svd`)",
    )
    download: bool = Field(True, description="also compress downloads (not with topk)")


class ExperimentConfig(Section):
    """An experiment. Every run folder contains its resolved configuration, ``config.yaml``."""

    name: Name = Field("experiment", description="title in reports and tracking")
    seed: Seed = Field(0, description="seed of all random draws; equal seeds give equal bits on equal hardware")
    algorithm: AlgorithmSection = AlgorithmSection()
    dataset: DatasetSection = DatasetSection()
    partition: PartitionSection = PartitionSection()
    backbone: BackboneSection = BackboneSection()
    lora: LoraSection = LoraSection()
    attack: AttackSection = AttackSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    byzantine: ByzantineSection = ByzantineSection()
    compression: CompressionSection = CompressionSection()
    cluster: ClusterSection = ClusterSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _check_across_sections(self) -> ExperimentConfig:
        clients, per_round = self.partition.num_clients, self.training.clients_per_round
        if per_round is not None and per_round > clients:
            raise conflict("training.clients_per_round", per_round, f"must be at most partition.num_clients, {clients}")
        if self.cluster.num_actors == "per_client" and self.training.cohort_size not in (1, "auto"):
            raise conflict("cluster.num_actors", "per_client", "needs training.cohort_size=1")
        return self

    @property
    def reported_epsilon(self) -> float:
        """The L-infinity budget, in pixel units, that results are about, and that guard, game and mixture attack with.

        It is that of training where the evaluation measures it, else that of the first attack of the evaluation which
        has one.
        """
        specs = self.evaluation.specs
        measured = [spec.epsilon for spec in specs if spec.norm == "linf" and math.isfinite(spec.epsilon)]
        is_measured = any(math.isclose(epsilon, self.attack.epsilon) for epsilon in measured)
        return self.attack.epsilon if is_measured or not measured else measured[0]

    def to_yaml(self) -> str:
        """Return the configuration as YAML, with keys in the order of the sections."""
        return to_yaml(self.model_dump(mode="json"))

    def flat(self) -> dict[str, str]:
        """Return ``{dotted key: value as text}``, the parameters in MLflow."""
        return flatten(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file and apply ``KEY=VALUE`` overrides. Relative paths in it start in the current directory.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, or a value has a wrong type or is out of range.
    """
    return build(ExperimentConfig, read_overridden(path, overrides))


PATHS: dict[str, Callable[[str], str]] = {
    "dataset.name": stored_dataset,
    "dataset.root": stored_path,
    "backbone.checkpoint": stored_path,
    "algorithm.teacher.checkpoint": stored_path,
    "cluster.launcher": stored_path,
}
"""Settings that are or contain a path, and how it becomes an absolute one."""


def with_stored_paths(tree: Any, key: str = "") -> Any:
    """Return settings that are not checked yet with absolute paths; what is no path stays as it is.

    Args:
        tree: settings, sections in each other.
        key: dotted, of ``tree`` itself; empty: it is a whole experiment.
    """
    if isinstance(tree, Mapping):
        return {
            name: with_stored_paths(value, key if key in PATHS else f"{key}.{name}".strip("."))
            for name, value in tree.items()
        }
    if isinstance(tree, list):
        return [with_stored_paths(value, key) for value in tree]
    try:
        return PATHS[key](tree) if isinstance(tree, str) and key in PATHS else tree
    except ValueError:  # the check of the experiment says what is wrong
        return tree

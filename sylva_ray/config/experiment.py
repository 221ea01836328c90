"""An experiment on a page: frozen sections, read from YAML, changed by ``KEY=VALUE`` with dotted names.

Unknown keys are refused, values are checked at construction, and every ``auto`` is resolved before the first round, so
the ``config.yaml`` in a run folder says exactly what ran. Epsilons are in [0, 1] pixel units and may be written "8/255".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sylva_ray.attacks.pgd import PgdAttack, default_step_size
from sylva_ray.config.attacks import EvaluationAttack
from sylva_ray.config.schema import build, flatten, read_overridden
from sylva_ray.core.sections import PixelUnits, Section
from sylva_ray.core.types import AttackSpec

OFFLINE_BACKBONE = "vit_micro_patch8_32"
"""The backbone whose checkpoint ships in this package: ViT, 32 px, patch 8, width 192, depth 6."""


class AlgorithmSection(BaseModel):
    """``name`` of a registered method, or ``package.module:Class``; the other keys are that method's own parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = "sylva"

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything but the name, not yet checked (the method's own ``Parameters`` does that)."""
        return dict(self.model_extra or {})


class DatasetSection(Section):
    """``name``: digits, cifar10, cifar100, stl10, gtsrb (torchvision), ``imagefolder:PATH`` or ``parquet:PATH``."""

    name: str = "digits"
    root: str = Field("~/.cache/sylva_ray/datasets", description="where torchvision's data sets are kept")
    max_train: int | None = Field(None, ge=1, description="use a seeded, class-balanced subset of the training images")
    max_test: int | None = Field(None, ge=1, description="the same for the pool that client test sets are drawn from")
    test_pool: Literal["test", "train"] = Field(
        "test", description="train: the training images that max_train leaves out, for choosing hyperparameters"
    )


class PartitionSection(Section):
    """How the images are dealt to clients, and each client's images to its four splits."""

    kind: Literal["iid", "dirichlet", "pathological", "quantity"] = "dirichlet"
    num_clients: int = Field(10, ge=1)
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration over labels, or over sizes for `quantity`")
    classes_per_client: int = Field(2, ge=1, description="for `pathological`")
    min_samples: int = Field(10, ge=5, description="guaranteed training + validation images per client")
    valid_fraction: float = Field(0.2, gt=0, lt=1, description="of a client's images; halved into selection and guard")
    test_samples: int = Field(
        100, ge=1, description="test images per client, drawn with the client's class proportions"
    )


class BackboneSection(Section):
    """A timm model by name. Weights: the hub (`pretrained`), a `checkpoint`, or the one shipped with this package."""

    name: str = OFFLINE_BACKBONE
    pretrained: bool = False
    checkpoint: str | None = Field(None, description="safetensors file of the timm model's state_dict")
    image_size: int | None = Field(None, ge=8, description="side in pixels the model sees; None: the model's own")


class LoraSection(Section):
    """LoRA on linear layers; scaling is alpha / rank (Hu et al. 2022)."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    target_modules: tuple[str, ...] = ("attn.qkv", "attn.proj")


class AttackSection(Section):
    """The attack that training defends against: L-infinity PGD in [0, 1] pixel space (Madry et al. 2018).

    ``fgsm_rs`` is fast adversarial training (Wong et al. 2020): one step of 1.25 epsilon from a random start, with a guard that
    rolls an epoch back after which PGD-5 succeeds all of a sudden (catastrophic overfitting)."""

    name: Literal["pgd", "fgsm_rs"] = "pgd"
    norm: Literal["linf"] = "linf"
    epsilon: PixelUnits = Field(8 / 255, ge=0, le=1)
    steps: int = Field(10, ge=1)
    step_size: PixelUnits | None = Field(None, gt=0, le=1, description="None: 2.5 epsilon / steps, at most epsilon")
    random_start: bool = True

    def spec(self, epsilon: float | None = None, loss: str = "ce") -> AttackSpec:
        """This attack at ``epsilon`` (default: its own), the step scaled with it."""
        epsilon = self.epsilon if epsilon is None else epsilon
        if self.name == "fgsm_rs":
            return AttackSpec("pgd", epsilon, 1, 1.25 * epsilon, random_start=True, loss=loss)
        if self.step_size is not None:
            ratio = epsilon / self.epsilon if self.epsilon else 1.0
            step_size = self.step_size * ratio
        else:
            step_size = default_step_size(epsilon, self.steps)
        return AttackSpec("pgd", epsilon, self.steps, step_size, self.random_start, loss=loss)


class AttentionKernels(Section):
    """The attention kernel of each precision: what ``training.attention=auto`` becomes."""

    float32: Literal["fused", "plain"] = "fused"
    bfloat16: Literal["fused", "plain"] = "fused"


class TrainingSection(Section):
    """Local training and the rhythm of rounds."""

    rounds: int = Field(10, ge=1)
    clients_per_round: int | None = Field(None, ge=1, description="None: everyone, every round")
    cohort_size: int | Literal["auto"] = Field("auto", description="clients trained in one stacked forward")
    local_epochs: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1, description="images per client and step")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, ge=0)
    lr_schedule: Literal["constant", "cosine"] = Field("cosine", description="over rounds")
    weight_decay: float = Field(1e-4, ge=0)
    clip_norm: float | None = Field(1.0, gt=0, description="per-client gradient norm; None: no clipping")
    augment: Literal["none", "flip", "crop", "flip_crop"] = Field(
        "none", description="on the device, before the attack"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of forwards in training; auto: bfloat16 where a measurement finds it faster"
    )
    attention: Literal["auto", "fused", "plain"] | AttentionKernels = Field(
        "auto", description="fused: torch's scaled_dot_product_attention; plain: two matrix products; auto: measured"
    )
    device: Literal["cpu", "cuda", "auto"] = "auto"

    @model_validator(mode="after")
    def _check_cohort(self) -> TrainingSection:
        if isinstance(self.cohort_size, int) and self.cohort_size < 1:
            raise ValueError(f"training.cohort_size={self.cohort_size} must be at least 1, or auto")
        return self


class EvaluationSection(Section):
    """What is measured. The last round of each phase is always evaluated in full."""

    every: int = Field(
        0, ge=0, description="also evaluate the first attack after every this many rounds; 0: only at the phases' ends"
    )
    attacks: tuple[EvaluationAttack, ...] = (PgdAttack(),)
    max_samples: int | None = Field(None, ge=1, description="test images per client in the rounds between")
    checks: bool = Field(True, description="unbounded-attack check S4 and collapse check S14")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of attacks in evaluation, guard and game; successes and benign answers are always those of float32",
    )

    @model_validator(mode="after")
    def _unique_labels(self) -> EvaluationSection:
        labels = [attack.spec().label for attack in self.attacks]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"evaluation.attacks={label} is listed twice")
        return self

    @property
    def specs(self) -> tuple[AttackSpec, ...]:
        """All attacks in their frozen form."""
        return tuple(attack.spec() for attack in self.attacks)


class ByzantineSection(Section):
    """Clients that do not play by the rules. Who they are is drawn from the seed; accuracies are those of the honest ones."""

    fraction: float = Field(0.0, ge=0, lt=1, description="of the clients, rounded down")
    attack: Literal["sign_flip", "gaussian", "label_flip", "alie", "ipm", "mimic", "nan"] = "sign_flip"
    strength: float | None = Field(
        None, gt=0, description="of sign_flip, gaussian, alie (z) and ipm; None: the attack's own"
    )

    @model_validator(mode="after")
    def _strength_has_an_effect(self) -> ByzantineSection:
        if self.strength is not None and self.attack in ("label_flip", "mimic", "nan"):
            raise ValueError(f"byzantine.strength={self.strength:g} has no effect on {self.attack}: leave it out")
        return self


class CompressionSection(Section):
    """What a client's update is turned into before it travels. Any method can use it."""

    kind: Literal["none", "int8", "int4", "topk"] = "none"
    fraction: float = Field(0.05, gt=0, le=1, description="of the entries that topk keeps")
    error_feedback: bool = Field(True, description="what an upload lost is added to the next one")
    download: bool = Field(True, description="the server's answer is compressed too (not with topk)")


class ClusterSection(Section):
    """Where the work runs. The result does not depend on anything in this section but `threads_per_actor`."""

    pool: Literal["ray", "in_process"] = "ray"
    address: str | None = Field(None, description="None: start Ray here; else host:port, or `auto`")
    launcher: str | None = Field(
        None,
        description="the cluster.yaml whose workers an autoscaler may add; None: the one that made this head, if any",
    )
    num_actors: int | Literal["auto", "per_client"] = "auto"
    cpus_per_actor: float = Field(1.0, gt=0)
    gpus_per_actor: float = Field(0.0, ge=0)
    threads_per_actor: int = Field(1, ge=1)
    round_deadline_s: float | None = Field(None, gt=0)
    max_task_retries: int = Field(3, ge=0, description="how often one cohort is re-run after its actor died")
    connect_timeout_s: float = Field(20.0, gt=0)
    startup_timeout_s: float = Field(
        900.0, gt=0, description="how long to wait while no actor is up: a cloud needs minutes for a node"
    )

    @model_validator(mode="after")
    def _check_actors(self) -> ClusterSection:
        if isinstance(self.num_actors, int) and self.num_actors < 1:
            raise ValueError(f"cluster.num_actors={self.num_actors} must be at least 1, auto or per_client")
        return self


class TrackingSection(Section):
    """MLflow. ``uri`` wins over ``MLFLOW_TRACKING_URI``; without either, an sqlite store beside the run folder."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "sylva_ray"
    run_name: str | None = None
    detail: Literal["clients", "fleet"] = Field(
        "clients", description="fleet: no metrics of single clients, no figures and no adapters; what sweeps use"
    )
    parent_run_id: str | None = Field(None, description="the MLflow run that this one is shown under")
    tags: dict[str, str] = Field({}, description="more tags for the MLflow run")
    flush_timeout_s: float = Field(30.0, gt=0, description="how long the end of a run waits for a slow server")


class ExperimentConfig(Section):
    """One experiment. Every run folder holds this, resolved, as ``config.yaml``."""

    name: str = Field("experiment", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0)
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
            raise ValueError(f"training.clients_per_round={per_round} must be at most partition.num_clients, {clients}")
        if self.cluster.num_actors == "per_client" and self.training.cohort_size not in (1, "auto"):
            raise ValueError("cluster.num_actors=per_client needs training.cohort_size=1")
        return self

    def to_yaml(self) -> str:
        """The configuration as YAML text, keys in the order of the sections above."""
        return yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False)

    def flat(self) -> dict[str, str]:
        """``{dotted key: value as text}``: what the tracker logs as parameters."""
        return flatten(json.loads(self.model_dump_json()))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read ``path`` (YAML) and apply ``KEY=VALUE`` overrides. Paths inside stay as written.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, value out of range; names key, value and fix.
    """
    return build(ExperimentConfig, read_overridden(path, overrides))


CONFIG = "config.yaml"
"""The resolved configuration in a run folder."""

WRITTEN_BEFORE: dict[str, dict[str, Any]] = {
    "training": {"attention": {"float32": "fused", "bfloat16": "fused"}},
    "evaluation": {"precision": "float32"},
}
"""What a run folder of version 0.1 does not say, because there was no choice then."""


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The configuration of a run folder, of this version or an older one, with ``KEY=VALUE`` overrides.

    Raises:
        UserError: as `load_config`."""
    raw = read_overridden(run_dir / CONFIG, overrides)
    for section, values in WRITTEN_BEFORE.items():
        if isinstance(raw.get(section), dict):
            raw[section] = values | raw[section]
    return build(ExperimentConfig, raw)


Choices = Sequence[tuple[str, str]]

MEASURED: Choices = (("training", "precision"), ("training", "attention"), ("evaluation", "precision"))
"""Keys whose ``auto`` is resolved by a measurement."""

CHOICES: Choices = (("training", "device"), ("training", "cohort_size"), *MEASURED)
"""Keys whose ``auto`` is resolved, and which the result depends on."""


def with_choices_of(config: ExperimentConfig, present: ExperimentConfig, keys: Choices = CHOICES) -> ExperimentConfig:
    """``config`` with what the ``present`` run chose in place of ``auto``."""
    for section, key in keys:
        if getattr(getattr(config, section), key) == "auto":
            chosen = getattr(getattr(present, section), key)
            config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: chosen})})
    return config

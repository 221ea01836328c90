"""An experiment on a page: frozen sections, read from YAML, changed by ``KEY=VALUE`` with dotted names.

Unknown keys are refused, values are checked at construction, and every ``auto`` is resolved before the first round, so
the ``config.yaml`` in a run folder says exactly what ran. Epsilons are in [0, 1] pixel units and may be written "8/255".
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sylva_ray.errors import UserError
from sylva_ray.types import AttackSpec

T = TypeVar("T", bound=BaseModel)

OFFLINE_BACKBONE = "vit_micro_patch8_32"
"""The backbone whose checkpoint ships in this package: ViT, 32 px, patch 8, width 192, depth 6."""


def _parse_fraction(value: Any) -> Any:
    """Accept "8/255" wherever a pixel-unit number is expected."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError("expected a number or a fraction such as 8/255") from error
    return value


PixelUnits = Annotated[float, BeforeValidator(_parse_fraction)]


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


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


def default_step_size(epsilon: float, steps: int) -> float:
    """2.5 epsilon / steps (Madry et al. 2018), never more than epsilon."""
    return min(epsilon, 2.5 * epsilon / steps)


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
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of forwards in training; metrics are fp32"
    )
    device: Literal["cpu", "cuda", "auto"] = "auto"

    @model_validator(mode="after")
    def _check_cohort(self) -> TrainingSection:
        if isinstance(self.cohort_size, int) and self.cohort_size < 1:
            raise ValueError("training.cohort_size must be at least 1, or auto")
        return self


class EvaluationAttack(Section):
    """One evaluation attack. ``step_size`` None: 2.5 epsilon / steps."""

    name: Literal["fgsm", "pgd"] = "pgd"
    epsilon: PixelUnits = Field(8 / 255, ge=0, le=1)
    steps: int = Field(20, ge=1)
    step_size: PixelUnits | None = Field(None, gt=0, le=1)
    random_start: bool = True
    restarts: int = Field(1, ge=1)
    loss: Literal["ce", "margin"] = "ce"

    def spec(self) -> AttackSpec:
        """The frozen form that travels to the workers."""
        if self.name == "fgsm":
            return AttackSpec("fgsm", self.epsilon, 1, self.epsilon, False, 1, self.loss)
        step_size = self.step_size if self.step_size is not None else default_step_size(self.epsilon, self.steps)
        return AttackSpec("pgd", self.epsilon, self.steps, step_size, self.random_start, self.restarts, self.loss)


class EvaluationSection(Section):
    """What is measured. The last round of each phase is always evaluated in full."""

    every: int = Field(
        0, ge=0, description="also evaluate the first attack after every this many rounds; 0: only at the phases' ends"
    )
    attacks: tuple[EvaluationAttack, ...] = (EvaluationAttack(name="pgd", epsilon=8 / 255, steps=20),)
    max_samples: int | None = Field(None, ge=1, description="test images per client in the rounds between")
    checks: bool = Field(True, description="unbounded-attack check S4 and collapse check S14")

    @model_validator(mode="after")
    def _unique_labels(self) -> EvaluationSection:
        labels = [attack.spec().label for attack in self.attacks]
        doubles = {label for label in labels if labels.count(label) > 1}
        if doubles:
            raise ValueError(f"evaluation.attacks lists {', '.join(sorted(doubles))} twice")
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
    num_actors: int | Literal["auto", "per_client"] = "auto"
    cpus_per_actor: float = Field(1.0, gt=0)
    gpus_per_actor: float = Field(0.0, ge=0)
    threads_per_actor: int = Field(1, ge=1)
    round_deadline_s: float | None = Field(None, gt=0)
    max_task_retries: int = Field(3, ge=0, description="how often one cohort is re-run after its actor died")
    connect_timeout_s: float = Field(20.0, gt=0)

    @model_validator(mode="after")
    def _check_actors(self) -> ClusterSection:
        if isinstance(self.num_actors, int) and self.num_actors < 1:
            raise ValueError("cluster.num_actors must be at least 1, auto or per_client")
        return self


class TrackingSection(Section):
    """MLflow. ``uri`` wins over ``MLFLOW_TRACKING_URI``; without either, an sqlite store beside the run folder."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "sylva_ray"
    run_name: str | None = None
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
            raise ValueError(f"training.clients_per_round is {per_round}, but partition.num_clients is {clients}")
        if self.cluster.num_actors == "per_client" and self.training.cohort_size not in (1, "auto"):
            raise ValueError("cluster.num_actors=per_client needs training.cohort_size=1")
        return self

    def to_yaml(self) -> str:
        """The configuration as YAML text, keys in the order of the sections above."""
        return yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False)

    def flat(self) -> dict[str, str]:
        """``{dotted key: value as text}``: what the tracker logs as parameters."""
        return _flatten(json.loads(self.model_dump_json()))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read ``path`` (YAML) and apply ``KEY=VALUE`` overrides. Paths inside stay as written.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, value out of range; names key, value and fix.
    """
    return build(ExperimentConfig, read_overridden(path, overrides))


def read_overridden(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with ``KEY=VALUE`` overrides applied, not yet validated."""
    raw = read_yaml(path)
    for override in overrides:
        _apply_override(raw, override)
    return raw


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError("config", str(path), "no such file; the ones that ship are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("config", str(path), f"cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError("config", str(path), f"is not valid YAML ({' '.join(str(error).split())})") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError("config", str(path), "must hold a mapping of sections such as `dataset:` and `training:`")
    return raw


def build(schema: type[T], raw: Any, prefix: str = "") -> T:
    """Validate ``raw`` against ``schema``; the first problem becomes one readable line.

    Raises:
        UserError: names the dotted key, the value and what is allowed.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise _readable(schema, error, prefix) from None


def _readable(schema: type[BaseModel], error: ValidationError, prefix: str) -> UserError:
    problem = error.errors()[0]
    location = [
        str(part) for part in problem["loc"] if part not in ("int", "float", "str") and "literal" not in str(part)
    ]
    key = ".".join([prefix, *location] if prefix else location) or "config"
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        allowed = _keys_at(schema, location[:-1])
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return UserError(key, value, f"unknown key; {hint}Allowed here: {', '.join(allowed)}")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(value, dict):  # a check across keys names them itself
        first, _, rest = message.partition(" ")
        name, _, found = first.partition("=")
        return UserError(name, found or "see the other key", rest) if "." in name else UserError(key, "...", message)
    description = message[0].lower() + message[1:]
    return UserError(key, value, description.replace("input should be", "must be"))


def _keys_at(schema: type[BaseModel], location: Sequence[str]) -> list[str]:
    current: Any = schema
    for part in location:
        if part.isdigit():
            continue
        annotation = current.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if current is None:
            return []
    return list(current.model_fields)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError("override", override, "must be KEY=VALUE with a dotted key, e.g. partition.num_clients=50")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    node = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(key, text, f"{parent!r} is a value, not a section")
        node = child
    node[leaf] = value


def _flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict):
        flat: dict[str, str] = {}
        for key, value in tree.items():
            flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(tree) if isinstance(tree, list) else str(tree)}

"""Pre-training a backbone where none can be downloaded: supervised, optionally adversarial, resumable bit for bit.

The recipe is the usual one for small vision transformers (Touvron et al. 2021): AdamW, warm-up and cosine, label smoothing,
mixup (Zhang et al. 2018), cutmix (Yun et al. 2019), random resized crops. Every draw is named by the epoch, so a run that was
cut and resumed ends with the bits of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file, save_file

from sylva_ray.attacks.pgd import pgd
from sylva_ray.config.experiment import AttackSection, AttentionKernels, BackboneSection, DatasetSection
from sylva_ray.config.schema import build, read_overridden
from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import Section
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import Split
from sylva_ray.data.augment import augmented
from sylva_ray.data.datasets import Dataset, load_dataset
from sylva_ray.models.backbone import Backbone, create_backbone
from sylva_ray.models.cohort import FunctionalStack, as_client, to_parameters
from sylva_ray.models.compute_choice import fastest
from sylva_ray.models.kernels import AttentionSwitch
from sylva_ray.storage.jsonl import append_record, read_records

WEIGHTS, OPTIMIZER, DONE = "weights.safetensors", "optimizer.safetensors", "done.json"
RESULT, CARD, LOG = "backbone.safetensors", "model_card.md", "log.jsonl"
EVALUATION_BATCH = 500


class PretrainTraining(Section):
    """The recipe. ``mixup`` and ``cutmix`` are the alphas of their Beta distributions; 0 turns one off."""

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(256, ge=2)
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
    threads: int = Field(2, ge=1)
    device: Literal["cpu", "cuda", "auto"] = "auto"


class PretrainConfig(Section):
    """``init``: from scratch, or from the weights that ``backbone`` names. ``adversarial`` trains on PGD images of ``attack``."""

    seed: int = Field(0, ge=0)
    init: Literal["scratch", "backbone"] = "scratch"
    dataset: DatasetSection
    backbone: BackboneSection = BackboneSection()
    adversarial: bool = False
    attack: AttackSection = AttackSection(epsilon=4 / 255, steps=2)
    training: PretrainTraining = PretrainTraining()


def load_pretrain_config(path: str | Path, overrides: Sequence[str]) -> PretrainConfig:
    """Read YAML and apply ``KEY=VALUE`` overrides.

    Raises:
        UserError: see `sylva_ray.config.experiment.load_config`.
    """
    return build(PretrainConfig, read_overridden(path, overrides))


def pretrain(config: PretrainConfig, out: Path, resume: bool, progress: Callable[[dict[str, Any]], None]) -> Path:
    """Train, and write ``out/backbone.safetensors`` (half precision, with its head) and ``out/model_card.md``.

    Args:
        out: also holds ``config.json``, ``log.jsonl`` (one record per epoch) and a checkpoint of the newest epoch.
        resume: go on from that checkpoint; without it, ``out`` must be new.
        progress: called with every epoch's record: epoch, loss, top1 (fraction of the test split), lr, seconds.

    Raises:
        UserError: the folder is not free, holds another config, or the data cannot be read.
    """
    dataset = load_dataset(config.dataset, create_backbone(config.backbone, 2).image_size, config.seed)
    config = _with_compute_choice(config, dataset, out if resume else None)
    _claim(out, config, resume)
    trainer = _Trainer(config, dataset)
    first = trainer.restore(out) if resume else 0
    for epoch in range(first, config.training.epochs):
        started = time.perf_counter()
        loss = trainer.epoch(epoch)
        record = {
            "epoch": epoch + 1,
            "loss": loss,
            "top1": top1(trainer.backbone, dataset.test, trainer.device),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
        }
        trainer.save(out, epoch)
        append_record(out / LOG, record)
        progress(record)
    return _finish(config, dataset, trainer, out)


class _Trainer:
    """Model, optimiser and the schedule's arithmetic."""

    def __init__(self, config: PretrainConfig, dataset: Dataset) -> None:
        self.config, self.train, self.num_classes = config, dataset.train, dataset.num_classes
        wanted = config.training.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise UserError("training.device", "cuda", "there is no GPU here; use cpu or auto")
        self.device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
        torch.set_num_threads(config.training.threads)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # timm initialises from the global stream
            architecture = create_backbone(config.backbone, dataset.num_classes)
            if config.init == "scratch":
                architecture.model.init_weights()  # type: ignore[operator]
        self.backbone = architecture.to(self.device).requires_grad_(True)
        kernel = config.training.attention
        assert kernel != "auto", "resolved by `pretrain`"
        AttentionSwitch(self.backbone.model).use(AttentionKernels(float32=kernel, bfloat16=kernel), torch.float32)
        matrices = [p for p in self.backbone.parameters() if p.ndim > 1]
        others = [p for p in self.backbone.parameters() if p.ndim <= 1]
        decay = config.training.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.training.lr)
        self.steps_per_epoch = len(self.train) // min(config.training.batch_size, len(self.train))

    def epoch(self, epoch: int) -> float:
        """One pass in an order of its own; returns the mean training loss."""
        training = self.config.training
        stream = generator(self.config.seed, "pretrain", round=epoch)
        order = torch.randperm(len(self.train), generator=stream).numpy()
        total = 0.0
        for step in range(self.steps_per_epoch):
            rows = order[step * training.batch_size : (step + 1) * training.batch_size]
            x, target = self._batch(rows, stream)
            if self.config.adversarial:
                x = self._adversarial(x, target, stream)
            self.backbone.train()
            loss = self._loss(x, target).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), training.clip_norm)
            self._schedule(epoch * self.steps_per_epoch + step)
            self.optimizer.step()
            total += float(loss.detach())
        return total / self.steps_per_epoch

    def _batch(self, rows: np.ndarray, stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented pixels ``[b, 3, H, W] in [0, 1]`` and soft targets ``[b, num_classes]``."""
        training = self.config.training
        simple = "flip" if training.augment == "resized_crop" else training.augment
        images = augmented(self.train.images[rows], simple, stream)
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).float() / 255
        if training.augment == "resized_crop":
            x = resized_crops(x, training.crop_scale, stream)
        labels = torch.from_numpy(self.train.labels[rows]).to(self.device)
        target = F.one_hot(labels, self.num_classes).float()
        target = target * (1 - training.label_smoothing) + training.label_smoothing / self.num_classes
        return mixed(x, target, training.mixup, training.cutmix, stream)

    def _loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        bfloat16 = self.config.training.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            logits = self.backbone(x)
        return F.cross_entropy(logits.float(), target, reduction="none")

    def _adversarial(self, x: torch.Tensor, target: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        noise = (torch.rand(x.shape, generator=stream) * 2 - 1).to(x.device)
        self.backbone.eval()
        return pgd(lambda u: self._loss(u, target), x, self.config.attack.spec(), noise)

    def _schedule(self, step: int) -> None:
        """Linear warm-up, then cosine to 0."""
        training = self.config.training
        warmup = training.warmup_epochs * self.steps_per_epoch
        total = training.epochs * self.steps_per_epoch
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = training.lr * factor

    # -- checkpoints: a folder per epoch, complete once `done.json` is there ----------------------------------------------

    def save(self, out: Path, epoch: int) -> None:
        """Write ``checkpoint/epoch_<n>/`` and drop the older ones."""
        folder = out / "checkpoint" / f"epoch_{epoch:04d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(self._weights(), folder / WEIGHTS)
        moments = self.optimizer.state_dict()["state"]
        flat = {f"{index}.{name}": value.clone() for index, state in moments.items() for name, value in state.items()}
        save_file(flat, folder / OPTIMIZER)
        (folder / DONE).write_text(json.dumps({"epoch": epoch}))
        for old in sorted((out / "checkpoint").glob("epoch_*"))[:-1]:
            shutil.rmtree(old)

    def restore(self, out: Path) -> int:
        """Load the newest complete epoch; returns the next one."""
        folders = [f for f in sorted((out / "checkpoint").glob("epoch_*")) if (f / DONE).exists()]
        if not folders:
            return 0
        self.backbone.model.load_state_dict(load_file(folders[-1] / WEIGHTS))
        state = self.optimizer.state_dict()
        for key, value in load_file(folders[-1] / OPTIMIZER).items():
            index, name = key.split(".")
            state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)
        return int(json.loads((folders[-1] / DONE).read_text())["epoch"]) + 1

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in self.backbone.model.state_dict().items()}


def resized_crops(x: torch.Tensor, smallest: float, stream: torch.Generator) -> torch.Tensor:
    """Random resized crops (Szegedy et al. 2015): area in [smallest, 1], aspect ratio in [3/4, 4/3], one per image."""
    n = len(x)
    area, ratio, right, down = torch.rand(4, n, generator=stream)
    area = smallest + area * (1 - smallest)
    ratio = torch.exp((ratio * 2 - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (right * 2 - 1) * (1 - width), (down * 2 - 1) * (1 - height)
    grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False).clamp(0, 1)


def mixed(
    x: torch.Tensor, target: torch.Tensor, mixup: float, cutmix: float, stream: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or cutmix of a batch with a permutation of itself (one or the other, by a coin, where both are on)."""
    if mixup == 0 and cutmix == 0:
        return x, target
    use_cutmix = cutmix > 0 and (mixup == 0 or float(torch.rand((), generator=stream)) < 0.5)
    alpha = cutmix if use_cutmix else mixup
    numpy_stream = np.random.default_rng(int(torch.randint(2**62, (), generator=stream)))
    share = float(numpy_stream.beta(alpha, alpha))
    partner = torch.randperm(len(x), generator=stream).to(x.device)
    if use_cutmix:
        height, width = x.shape[-2:]
        side = math.sqrt(1 - share)
        top, left = numpy_stream.integers(height), numpy_stream.integers(width)
        rows = slice(max(0, round(top - side * height / 2)), min(height, round(top + side * height / 2)))
        columns = slice(max(0, round(left - side * width / 2)), min(width, round(left + side * width / 2)))
        x = x.clone()
        x[..., rows, columns] = x[partner][..., rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        x = share * x + (1 - share) * x[partner]
    return x, share * target + (1 - share) * target[partner]


@torch.no_grad()
def top1(backbone: Backbone, split: Split, device: torch.device) -> float:
    """Accuracy in float32 on a split, in [0, 1]."""
    backbone.eval()
    right = 0
    for first in range(0, len(split), EVALUATION_BATCH):
        window = slice(first, first + EVALUATION_BATCH)
        x = torch.tensor(split.images[window], device=device).float() / 255
        right += int((backbone(x).argmax(1).cpu().numpy() == split.labels[window]).sum())
    return right / len(split)


def _with_compute_choice(config: PretrainConfig, dataset: Dataset, resumed: Path | None) -> PretrainConfig:
    """Precision and attention kernel as values: what ``resumed`` was begun with, else what is faster here."""
    training = config.training
    if "auto" not in (training.precision, training.attention):
        return config
    if resumed is not None and (resumed / "config.json").exists():
        begun = _begun(resumed)["training"]
        chosen = {key: begun[key] for key in ("precision", "attention")}
    else:
        device = torch.device("cuda" if training.device != "cpu" and torch.cuda.is_available() else "cpu")
        model = FunctionalStack(create_backbone(config.backbone, dataset.num_classes).to(device))
        state = model.initial_state(generator(config.seed, "measurement"))
        params = to_parameters(as_client(state), device, torch.float32)
        kernel = training.attention
        pinned = None if kernel == "auto" else AttentionKernels(float32=kernel, bfloat16=kernel)
        choice = fastest(model, params, dataset.train.images.shape[-1], device, training.threads, pinned)
        precision = choice.precision if training.precision == "auto" else training.precision
        chosen = {"precision": precision, "attention": getattr(choice.attention, precision)}
    unset = {key: value for key, value in chosen.items() if getattr(training, key) == "auto"}
    return config.model_copy(update={"training": training.model_copy(update=unset)})


def _begun(out: Path) -> dict[str, Any]:
    """The config in a folder; before there was a choice, attention was fused."""
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    config["training"] = {"attention": "fused"} | config["training"]
    return config


def _claim(out: Path, config: PretrainConfig, resume: bool) -> None:
    path = out / "config.json"
    if resume:
        if not path.exists():
            raise UserError("--resume", str(out), "holds no pre-training to resume")
        if _begun(out) != json.loads(config.model_dump_json()):
            raise UserError("--out", str(out), "holds a pre-training with another config")
    elif out.exists() and any(out.iterdir()):
        raise UserError("--out", str(out), "is not empty; add --resume to go on, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(config.model_dump_json(indent=1))


def _finish(config: PretrainConfig, dataset: Dataset, trainer: _Trainer, out: Path) -> Path:
    """The half-precision file, measured after the rounding, and its card."""
    result = out / RESULT
    weights = {
        name: value.detach().cpu().half().contiguous() for name, value in trainer.backbone.model.state_dict().items()
    }
    save_file(weights, result)
    section = config.backbone.model_copy(update={"checkpoint": str(result), "pretrained": False})
    accuracy = top1(create_backbone(section, dataset.num_classes).to(trainer.device), dataset.test, trainer.device)
    records = read_records(out / LOG)
    seconds = sum(record["seconds"] for record in records)
    lines = [
        f"# {config.backbone.name}",
        "",
        f"* Data: `{config.dataset.name}`, {len(dataset.train):,} training images, {dataset.num_classes} classes.",
        f"* Start: {'random weights' if config.init == 'scratch' else 'the weights that the backbone section names'}.",
        f"* Recipe: {config.training.model_dump_json()}",
        f"* Adversarial: {config.attack.model_dump_json() if config.adversarial else 'no'}",
        f"* Seconds: {seconds:,.0f} on {platform.machine()}, {os.cpu_count()} CPUs, {trainer.device.type},"
        f" {config.training.threads} threads.",
        f"* Top-1 of this half-precision file on {len(dataset.test):,} test images: {100 * accuracy:.1f} %.",
    ]
    (out / CARD).write_text("\n".join(lines) + "\n")
    return result

"""Pre-train a backbone where none can be downloaded: supervised, optionally adversarial, resumable.

The recipe is the usual one for small vision transformers (Touvron et al. 2021): AdamW, warm-up and cosine, label
smoothing, mixup (Zhang et al. 2018), cutmix (Yun et al. 2019) and random resized crops. All random numbers depend on
the seed and the epoch alone, so a resumed run ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sylva_ray.attacks.pgd import pgd
from sylva_ray.config.experiment import AttentionKernels
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import Split
from sylva_ray.data.augment import augmented
from sylva_ray.data.datasets import Dataset, load_dataset
from sylva_ray.models.backbone import Backbone, create_backbone
from sylva_ray.models.kernels import AttentionSwitch
from sylva_ray.pretraining.augment import mixed, resized_crops
from sylva_ray.pretraining.config import CONFIG, PretrainConfig, ResolvedPretrainConfig, load_resolved
from sylva_ray.pretraining.resolve import resolve_device, resolve_pretraining
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.claim import check_claim, list_names, write_marker
from sylva_ray.storage.jsonl import append_record, read_records
from sylva_ray.storage.lock import folder_lock

WEIGHTS, OPTIMIZER, DONE = "weights.safetensors", "optimizer.safetensors", "done.json"
RESULT, CARD, LOG = "backbone.safetensors", "model_card.md", "log.jsonl"
EVALUATION_BATCH = 500
"""Images in one forward pass of `top1`."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch; a line of ``log.jsonl``.

    Attributes:
        epoch: its number, from 1.
        loss: mean training loss.
        top1: accuracy on the test split, in [0, 1].
        lr: learning rate of the last step.
        seconds: wall-clock time.
    """

    epoch: int
    loss: float
    top1: float
    lr: float
    seconds: float


def pretrain(
    config: PretrainConfig,
    out: Path,
    resume: bool,
    progress: Callable[[EpochRecord], None],
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Train a backbone; write ``out/backbone.safetensors`` (half precision, with its head) and ``out/model_card.md``.

    Args:
        config: the run.
        out: the folder, which also holds ``config.json``, ``log.jsonl`` and a checkpoint of the newest epoch.
        resume: continue from that checkpoint; without it, ``out`` must be empty.
        progress: called after every epoch.
        notify: called with what the user should know about the data, one sentence each.

    Returns:
        The safetensors file.

    Raises:
        UserError: the folder is not free or holds another config, or the data cannot be read.
    """
    dataset = load_dataset(config.dataset, create_backbone(config.backbone, 2).image_size, config.seed)
    resolved = resolve_pretraining(config, dataset, out if resume else None)
    _check_claim(out, resolved, resume)
    with folder_lock(out, "--out"):
        _check_claim(out, resolved, resume)
        write_marker(out / CONFIG, resolved.model_dump_json(indent=1))
        if notify is not None:
            for text in dataset.notices:
                notify(text)
        return _train(resolved, dataset, out, resume, progress)


def _train(
    config: ResolvedPretrainConfig,
    dataset: Dataset,
    out: Path,
    resume: bool,
    progress: Callable[[EpochRecord], None],
) -> Path:
    """Run the epochs that are left, in a folder that has been claimed; see `pretrain`."""
    trainer = _Trainer(config, dataset)
    first = trainer.restore(out) if resume else 0
    for epoch in range(first, config.training.epochs):
        started = time.perf_counter()
        loss = trainer.epoch(epoch)
        record = EpochRecord(
            epoch=epoch + 1,
            loss=loss,
            top1=top1(trainer.backbone, dataset.test, trainer.device),
            lr=trainer.optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - started,
        )
        trainer.save(out, epoch)
        append_record(out / LOG, asdict(record))
        progress(record)
    return _finish(config, dataset, trainer, out)


class _Trainer:
    """The model, its optimiser and the schedule.

    Args:
        config: the run.
        dataset: the images.
    """

    def __init__(self, config: ResolvedPretrainConfig, dataset: Dataset) -> None:
        self.config, self.train, self.num_classes = config, dataset.train, dataset.num_classes
        self.device = resolve_device(config.training)
        torch.set_num_threads(config.training.threads)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # timm draws from torch's global generator
            architecture = create_backbone(config.backbone, dataset.num_classes)
            if config.init == "scratch":
                architecture.model.init_weights()  # type: ignore[operator]
        self.backbone = architecture.to(self.device).requires_grad_(True)
        kernel = config.training.attention
        AttentionSwitch(self.backbone.model).use(AttentionKernels(float32=kernel, bfloat16=kernel), torch.float32)
        matrices = [p for p in self.backbone.parameters() if p.ndim > 1]
        others = [p for p in self.backbone.parameters() if p.ndim <= 1]
        decay = config.training.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.training.lr)
        self.steps_per_epoch = len(self.train) // min(config.training.batch_size, len(self.train))

    def epoch(self, epoch: int) -> float:
        """Train for one epoch, in an order that depends on its number; return the mean loss."""
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
        """Return augmented images ``[b, 3, H, W] in [0, 1]`` and soft targets ``[b, num_classes]``."""
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
        """Set the learning rate of a step: linear warm-up, then a cosine to 0."""
        training = self.config.training
        warmup = training.warmup_epochs * self.steps_per_epoch
        total = training.epochs * self.steps_per_epoch
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = training.lr * factor

    # -- checkpoints: a folder per epoch, complete once it holds `done.json` -------------------------------------------

    def save(self, out: Path, epoch: int) -> None:
        """Write ``checkpoint/epoch_<n>/`` and remove the older ones."""
        folder = out / "checkpoint" / f"epoch_{epoch:04d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(self._weights(), folder / WEIGHTS)
        moments = self.optimizer.state_dict()["state"]
        flat = {f"{index}.{name}": value.clone() for index, state in moments.items() for name, value in state.items()}
        save_file(flat, folder / OPTIMIZER)
        write_atomically(folder / DONE, json.dumps({"epoch": epoch}), durable=True)
        for old in _epoch_folders(out)[:-1]:
            (old / DONE).unlink(missing_ok=True)  # first: without it, the rest does not count
            shutil.rmtree(old)

    def restore(self, out: Path) -> int:
        """Load the newest complete checkpoint; return the number of the next epoch."""
        folders = [folder for folder in _epoch_folders(out) if (folder / DONE).exists()]
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


@torch.no_grad()
def top1(backbone: Backbone, split: Split, device: torch.device) -> float:
    """Return the accuracy on a split, in [0, 1], computed in float32."""
    backbone.eval()
    num_correct = 0
    for first in range(0, len(split), EVALUATION_BATCH):
        window = slice(first, first + EVALUATION_BATCH)
        x = torch.tensor(split.images[window], device=device).float() / 255
        num_correct += int((backbone(x).argmax(1).cpu().numpy() == split.labels[window]).sum())
    return num_correct / len(split)


def _epoch_folders(out: Path) -> list[Path]:
    """Return the folders of checkpoints, the oldest first; an epoch from 10,000 has more than four digits."""
    folders = [path for path in (out / "checkpoint").glob("epoch_*") if path.name.removeprefix("epoch_").isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("epoch_")))


def _check_claim(out: Path, config: ResolvedPretrainConfig, resume: bool) -> None:
    check_claim(str(out), list_names(out), CONFIG, "pre-training", resume)
    if resume and load_resolved(out).model_dump_json() != config.model_dump_json():
        raise UserError("--out", str(out), "holds a pre-training with another config")


def _finish(config: ResolvedPretrainConfig, dataset: Dataset, trainer: _Trainer, out: Path) -> Path:
    """Write the backbone in half precision, and its model card with the accuracy of that file."""
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

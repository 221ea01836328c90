"""Pre-train a backbone where none can be downloaded: supervised, optionally adversarial, resumable.

The recipe is the usual one for small vision transformers (Touvron et al. 2021): AdamW, warm-up and cosine, label
smoothing, mixup (Zhang et al. 2018), cutmix (Yun et al. 2019) and random resized crops. All random numbers depend on
the seed and the epoch alone, so a resumed run ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save

from sylva_ray.attacks.pgd import pgd
from sylva_ray.attacks.state import predicted_classes
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.errors import RepeatedError, UserError
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.seeding import ImageDraws, generator, image_keys
from sylva_ray.core.text import one_line
from sylva_ray.core.types import Split, stack_digest
from sylva_ray.core.version import __version__
from sylva_ray.data.augment import augmented
from sylva_ray.data.datasets import Dataset, load_dataset
from sylva_ray.data.digest import dataset_digests
from sylva_ray.models.backbone import Backbone, backbone_arrays, create_backbone
from sylva_ray.models.device_memory import can_be_resident, to_device
from sylva_ray.models.kernels import AttentionSwitch
from sylva_ray.preparation.resolve import local_device
from sylva_ray.pretraining.augment import mixed, resized_crops
from sylva_ray.pretraining.config import PretrainConfig, ResolvedPretrainConfig
from sylva_ray.pretraining.folder import CHECKPOINTS, PretrainFolder
from sylva_ray.pretraining.resolve import resolve_pretraining
from sylva_ray.storage.atomic import json_text, write_atomically
from sylva_ray.storage.jsonl import append_record, rewrite_records
from sylva_ray.storage.lock import folder_lock
from sylva_ray.storage.manifest import DamagedError, folder_name, read_checked, remove_step, steps_in, write_step
from sylva_ray.storage.reading import parse_json

WEIGHTS, OPTIMIZER, PROGRESS = "weights.safetensors", "optimizer.safetensors", "progress.json"
UNIT = "epoch"
"""What a checkpoint's folder is named after."""

OLD_MARKER = "done.json"
"""What checkpoints had in place of a manifest until version 0.1."""

NUM_KEPT = 2
"""Checkpoints kept: the newest, and one in case that it is damaged."""

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
        changed_inputs: data and weights that are not those that the pre-training began with, in words; None: none.
    """

    epoch: int
    loss: float
    top1: float
    lr: float
    seconds: float
    changed_inputs: list[str] | None = None


def pretrain(
    config: PretrainConfig,
    out: Path,
    resume: bool,
    progress: Callable[[EpochRecord], None],
    notify: Callable[[str], None] | None = None,
    allow_changed: bool = False,
) -> Path:
    """Train a backbone; write ``out/backbone.safetensors`` (half precision, with its head) and ``out/model_card.md``.

    A pre-training that has finished is left as it is.

    Args:
        config: the run.
        out: the folder (`sylva_ray.pretraining.folder`).
        resume: continue from its newest checkpoint; without it, ``out`` must be empty.
        progress: called after every epoch.
        notify: called with what the user should know about the data, one sentence each.
        allow_changed: whether data and initial weights may differ from those that the pre-training began with; the
            model card then says so.

    Returns:
        The safetensors file.

    Raises:
        UserError: the folder is not free or holds another config, or the data cannot be read or have changed.
        RunError: the training diverged.
    """
    folder = PretrainFolder(out)
    folder.check_claim(config, resume)
    finished = folder.finished() if resume else None
    if finished is not None:
        return finished
    dataset = load_dataset(config.dataset, create_backbone(config.backbone, 2).image_size, config.seed)
    resolved = folder.as_started(config) if resume else resolve_pretraining(config, dataset)
    trainer = _Trainer(resolved, dataset)
    inputs = Inputs(version=__version__, data=dataset_digests(dataset), weights=trainer.initial_digest())
    with folder_lock(out, "--out"):
        check = folder.claim(resolved, inputs, resume, allow_changed)
        if notify is not None:
            for text in (*dataset.notices, *check.notices):
                notify(text)
        return _train(trainer, folder, progress, check.changed)


def _train(
    trainer: _Trainer, folder: PretrainFolder, progress: Callable[[EpochRecord], None], changed: Sequence[str]
) -> Path:
    """Run the epochs that are left, in a folder that has been claimed; see `pretrain`."""
    records = trainer.restore(folder.path / CHECKPOINTS)
    rewrite_records(folder.log, records)
    for epoch in range(len(records), trainer.config.training.epochs):
        started = time.perf_counter()
        loss = trainer.epoch(epoch)
        if not math.isfinite(loss):
            raise RepeatedError(f"the loss of epoch {epoch + 1} is not finite: start again with a lower training.lr")
        record = EpochRecord(
            epoch=epoch + 1,
            loss=loss,
            top1=top1(trainer.backbone, trainer.dataset.test, trainer.device),
            lr=trainer.optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - started,
            changed_inputs=list(changed) or None,
        )
        records.append(asdict(record))
        trainer.save(folder.path / CHECKPOINTS, epoch, records)
        append_record(folder.log, records[-1])
        progress(record)
    return _finish(trainer, folder, records)


def schedule(step: int, warmup: float, total: int) -> float:
    """Return the learning rate of a step relative to the largest: a linear warm-up, then a cosine to 0.

    Args:
        step: from 0.
        warmup: steps of the warm-up, perhaps not a whole number.
        total: steps of the training.

    >>> [round(schedule(step, 1.5, 5), 3) for step in range(5)]
    [0.667, 1.0, 0.95, 0.611, 0.188]
    """
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class _Trainer:
    """The model, its optimiser and the schedule.

    Args:
        config: the run.
        dataset: the images.
    """

    def __init__(self, config: ResolvedPretrainConfig, dataset: Dataset) -> None:
        self.config, self.dataset = config, dataset
        self.train, self.num_classes = dataset.train, dataset.num_classes
        self.device = torch.device(local_device(config.training.device))
        torch.set_num_threads(config.training.threads)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # timm draws from torch's global generator
            architecture = _initial_backbone(config, dataset.num_classes)
        self.backbone = architecture.to(self.device).requires_grad_(True)
        kernel = config.training.attention
        AttentionSwitch(self.backbone.model).use(AttentionKernels(float32=kernel, bfloat16=kernel), torch.float32)
        matrices = [p for p in self.backbone.parameters() if p.ndim > 1]
        others = [p for p in self.backbone.parameters() if p.ndim <= 1]
        decay = config.training.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.training.lr, fused=self.device.type == "cuda")
        images, is_resident = self.train.images, can_be_resident(self.train.images.nbytes, self.device)
        self.images = torch.from_numpy(images).to(self.device) if is_resident else torch.from_numpy(images)
        self.labels = torch.from_numpy(self.train.labels).to(self.device)
        self.steps_per_epoch = len(self.train) // min(config.training.batch_size, len(self.train))

    def initial_digest(self) -> dict[str, str]:
        """Return the digest of the weights that the training starts from; none where they are drawn from the seed."""
        if self.config.init == "scratch":
            return {}
        return {"backbone": stack_digest(backbone_arrays(self.backbone)).hex()}

    def epoch(self, epoch: int) -> float:
        """Train for one epoch, in an order that depends on its number; return the mean loss."""
        training = self.config.training
        stream = generator(self.config.seed, "pretrain", round=epoch)
        order = torch.randperm(len(self.train), generator=stream).numpy()
        total = torch.zeros((), dtype=torch.float64, device=self.device)  # read once, so that no step waits for it
        for step in range(self.steps_per_epoch):
            rows = order[step * training.batch_size : (step + 1) * training.batch_size]
            draws = ImageDraws(image_keys(self.config.seed, "pretrain", -1, rows, epoch)).to(self.device)
            x, target = self._batch(rows, draws, stream)
            if self.config.adversarial:
                x = self._adversarial(x, target, draws)
            self.backbone.train()
            loss = self._loss(x, target).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), training.clip_norm)
            self._schedule(epoch * self.steps_per_epoch + step)
            self.optimizer.step()
            total += loss.detach()
        return float(total) / self.steps_per_epoch

    def _batch(self, rows: np.ndarray, draws: ImageDraws, stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return augmented images ``[b, 3, H, W] in [0, 1]`` and soft targets ``[b, num_classes]``."""
        training = self.config.training
        simple = "flip" if training.augment == "resized_crop" else training.augment
        chosen = to_device(torch.from_numpy(rows), self.images.device)
        images = self.images[chosen]
        images = images if images.device == self.device else to_device(images, self.device)
        x = augmented(images, simple, draws, stream_index=1).float() / 255
        if training.augment == "resized_crop":
            x = resized_crops(x, training.crop_scale, stream)
        classes = torch.arange(self.num_classes, device=self.device)
        target = (self.labels[chosen.to(self.device, non_blocking=True), None] == classes).float()
        target = target * (1 - training.label_smoothing) + training.label_smoothing / self.num_classes
        return mixed(x, target, training.mixup, training.cutmix, stream)

    def _loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        bfloat16 = self.config.training.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            logits = self.backbone(x)
        return F.cross_entropy(logits.float(), target, reduction="none")

    def _adversarial(self, x: torch.Tensor, target: torch.Tensor, draws: ImageDraws) -> torch.Tensor:
        self.backbone.eval()
        return pgd(lambda u: self._loss(u, target), x, self.config.attack.spec(), draws.signed(0, x.shape[1:]))

    def _schedule(self, step: int) -> None:
        """Set the learning rate of a step."""
        training, steps = self.config.training, self.steps_per_epoch
        factor = schedule(step, training.warmup_epochs * steps, training.epochs * steps)
        for group in self.optimizer.param_groups:
            group["lr"] = training.lr * factor

    # -- checkpoints: a folder per epoch, complete once it holds a manifest --------------------------------------------

    def save(self, root: Path, epoch: int, records: Sequence[Mapping[str, object]]) -> None:
        """Write ``epoch_<n>/`` with the records so far, and remove all but the newest `NUM_KEPT` epochs."""
        folder = root / folder_name(epoch, UNIT)
        remove_step(folder)
        moments = self.optimizer.state_dict()["state"]
        flat = {f"{index}.{name}": value.clone() for index, state in moments.items() for name, value in state.items()}
        files = {WEIGHTS: save(self._weights()), OPTIMIZER: save(flat), PROGRESS: json_text(list(records)).encode()}
        write_step(folder, epoch, files)
        for old in steps_in(root, UNIT)[:-NUM_KEPT]:
            remove_step(root / folder_name(old, UNIT))

    def restore(self, root: Path) -> list[dict[str, Any]]:
        """Load the newest checkpoint that is as it was written; return its records, one per epoch.

        Raises:
            UserError: all checkpoints are damaged, or of a version that wrote no manifests.
        """
        problem = ""
        for epoch in reversed(steps_in(root, UNIT)):
            folder = root / folder_name(epoch, UNIT)
            try:
                read = read_checked(folder, (WEIGHTS, OPTIMIZER, PROGRESS), ())
                files = {name: bytes(content) for name, content in read.items()}
                records = parse_json(files[PROGRESS])
                self.backbone.model.load_state_dict(load(files[WEIGHTS]))
                self._load_optimizer(load(files[OPTIMIZER]))
            except FileNotFoundError:  # what an interruption leaves
                problem = f"{folder.name} is of an earlier version" if (folder / OLD_MARKER).exists() else problem
                continue
            except DamagedError as error:
                problem = problem or str(error)
                continue
            except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
                raise UserError(
                    "checkpoint", str(folder), f"is not of this pre-training ({one_line(str(error))})"
                ) from None
            if len(records) == epoch + 1:
                return list(records)
            raise UserError("checkpoint", str(folder), f"must have {epoch + 1} records")
        if problem:
            raise UserError("checkpoint", str(root), f"none can be used ({problem}); start again with another --out")
        return []

    def _load_optimizer(self, moments: Mapping[str, torch.Tensor]) -> None:
        state = self.optimizer.state_dict()
        for key, value in moments.items():
            index, name = key.split(".")
            state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in self.backbone.model.state_dict().items()}


def _initial_backbone(config: PretrainConfig, num_classes: int) -> Backbone:
    """Create the backbone with the weights that its training starts from.

    Random ones are drawn from torch's generator; those of a model without ``init_weights`` are the constructor's, which
    are the same for every seed.
    """
    if config.init != "scratch":
        return create_backbone(config.backbone, num_classes)
    section = config.backbone.model_copy(update={"pretrained": False, "checkpoint": None})
    backbone = create_backbone(section, num_classes)
    initialise = getattr(backbone.model, "init_weights", None)
    if initialise is not None:
        initialise()
    return backbone


@torch.no_grad()
def top1(backbone: Backbone, split: Split, device: torch.device) -> float:
    """Return the accuracy on a split, in [0, 1], computed in float32."""
    backbone.eval()
    num_correct = 0
    for first in range(0, len(split), EVALUATION_BATCH):
        window = slice(first, first + EVALUATION_BATCH)
        x = torch.tensor(split.images[window], device=device).float() / 255
        num_correct += int((predicted_classes(backbone(x)).cpu().numpy() == split.labels[window]).sum())
    return num_correct / len(split)


def _finish(trainer: _Trainer, folder: PretrainFolder, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write the backbone in half precision, and its model card with the accuracy of that file.

    Raises:
        RunError: a weight is too large for half precision.
    """
    config, dataset = trainer.config, trainer.dataset
    weights = {name: _in_half(value) for name, value in trainer.backbone.model.state_dict().items()}
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise RepeatedError("the weights are not finite in half precision: start again with a lower training.lr")
    write_atomically(folder.result, save(weights), durable=True)
    section = config.backbone.model_copy(update={"checkpoint": str(folder.result), "pretrained": False})
    accuracy = top1(create_backbone(section, dataset.num_classes).to(trainer.device), dataset.test, trainer.device)
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
        *_changed_lines(records),
        f"* Top-1 of this half-precision file on {len(dataset.test):,} test images: {100 * accuracy:.1f} %.",
    ]
    write_atomically(folder.card, "\n".join(lines) + "\n", durable=True)
    return folder.result


def _in_half(value: torch.Tensor) -> torch.Tensor:
    """Return a weight in half precision; the number of batches that batch normalisation has seen is an integer."""
    value = value.detach().cpu().contiguous()
    return value.half() if value.is_floating_point() else value


def _changed_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a model card about changed inputs, one for every set of them, with its first epoch."""
    first: dict[str, int] = {}
    for record in records:
        for text in record.get("changed_inputs") or ():
            first.setdefault(text, record["epoch"])
    what = "are not those that the pre-training began with (--allow-changed)"
    return [f"* Since epoch {epoch}, {text} {what}." for text, epoch in first.items()]

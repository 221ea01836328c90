"""Resolve the ``auto`` settings of a pre-training run."""

from __future__ import annotations

from pathlib import Path

import torch

from sylva_ray.config.experiment import AttentionKernels
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import generator
from sylva_ray.data.datasets import Dataset
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import FunctionalStack, as_client, to_parameters
from sylva_ray.models.compute_choice import fastest
from sylva_ray.pretraining.config import (
    CONFIG,
    PretrainConfig,
    PretrainTraining,
    ResolvedPretrainConfig,
    ResolvedPretrainTraining,
    load_resolved,
)


def resolve_device(training: PretrainTraining) -> torch.device:
    """Return the device to train on; ``auto`` is a GPU if there is one.

    Raises:
        UserError: a GPU was asked for, and this machine has none.
    """
    if training.device == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device", "cuda", "this machine has no GPU; use cpu or auto")
    return torch.device("cuda" if training.device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_pretraining(config: PretrainConfig, dataset: Dataset, resumed: Path | None) -> ResolvedPretrainConfig:
    """Resolve precision and attention kernel: those that ``resumed`` was started with, or else the fastest here.

    Args:
        config: the configuration of the user.
        dataset: the images.
        resumed: the folder of a pre-training to resume.

    Raises:
        UserError: a GPU was asked for, and this machine has none.
    """
    training = config.training
    precision, attention = training.precision, training.attention
    if precision == "auto" or attention == "auto":
        if resumed is not None and (resumed / CONFIG).exists():
            started = load_resolved(resumed).training
            chosen_precision, kernels = started.precision, _both(started.attention)
        else:
            device = resolve_device(training)
            model = FunctionalStack(create_backbone(config.backbone, dataset.num_classes).to(device))
            state = model.initial_state(generator(config.seed, "measurement"))
            params = to_parameters(as_client(state), device, torch.float32)
            pinned = None if attention == "auto" else _both(attention)
            choice = fastest(model, params, dataset.image_size, device, training.threads, pinned)
            chosen_precision, kernels = choice.precision, choice.attention
        precision = chosen_precision if precision == "auto" else precision
        attention = getattr(kernels, precision) if attention == "auto" else attention
    decided = {"precision": precision, "attention": attention}
    sections = {"training": ResolvedPretrainTraining(**dict(training) | decided)}
    return ResolvedPretrainConfig(**dict(config) | sections)


def _both(kernel: str) -> AttentionKernels:
    return AttentionKernels.model_validate({"float32": kernel, "bfloat16": kernel})

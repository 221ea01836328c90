"""Resolve the ``auto`` settings of a pre-training run."""

from __future__ import annotations

import torch

from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.seeding import generator
from sylva_ray.data.datasets import Dataset
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import FunctionalStack, as_client, to_parameters
from sylva_ray.models.compute_choice import fastest
from sylva_ray.preparation.resolve import kernels_of, local_device
from sylva_ray.pretraining.config import PretrainConfig, ResolvedPretrainConfig, ResolvedPretrainTraining


def resolve_pretraining(config: PretrainConfig, dataset: Dataset) -> ResolvedPretrainConfig:
    """Resolve precision and attention kernel to the fastest here.

    Args:
        config: the configuration of the user.
        dataset: the images.

    Raises:
        UserError: a GPU was asked for, and this machine has none.
    """
    training = config.training
    precision, attention = training.precision, training.attention
    if precision == "auto" or attention == "auto":
        device = torch.device(local_device(training.device))
        model = FunctionalStack(create_backbone(config.backbone, dataset.num_classes).to(device))
        state = model.initial_state(generator(config.seed, "measurement"))
        params = to_parameters(as_client(state), device, torch.float32)
        pinned: AttentionKernels | None = None if attention == "auto" else kernels_of(attention)
        choice = fastest(model, params, dataset.image_size, device, training.threads, pinned)
        precision = choice.precision if precision == "auto" else precision
        attention = getattr(choice.attention, precision) if attention == "auto" else attention
    decided = {"precision": precision, "attention": attention}
    sections = {"training": ResolvedPretrainTraining(**dict(training) | decided)}
    return ResolvedPretrainConfig(**dict(config) | sections)

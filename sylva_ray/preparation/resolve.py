"""Every ``auto`` that a result depends on becomes a value, once, before a run starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ClientState, stack_states
from sylva_ray.federation.cohorts import resolve_cohort_size
from sylva_ray.models.cohort import CohortModel, FunctionalStack, to_parameters
from sylva_ray.models.compute_choice import Alternative, ComputeChoice, can_run, fastest
from sylva_ray.models.lora import LoraStack


def resolve_settings(config: ExperimentConfig) -> ExperimentConfig:
    """Every ``auto`` that the result depends on becomes a value."""
    device = config.training.device
    if device == "auto":
        cluster = config.cluster
        elsewhere = cluster.pool == "ray" and cluster.address is not None  # a cluster's head need not have a GPU itself
        wanted = cluster.gpus_per_actor > 0 or cluster.pool == "in_process"
        device = "cuda" if wanted and (elsewhere or torch.cuda.is_available()) else "cpu"
    elif device == "cuda" and not torch.cuda.is_available() and config.cluster.address is None:
        raise UserError("training.device", "cuda", "there is no GPU here; use cpu or auto")
    training = config.training.model_copy(update={"device": device, "cohort_size": resolve_cohort_size(config)})
    return config.model_copy(update={"training": training})


def resolve_compute(
    config: ExperimentConfig, model: CohortModel, states: Sequence[ClientState], image_size: int, measure: bool = True
) -> ExperimentConfig:
    """Precision and attention kernels as values: what was asked for, else what is fastest here for a cohort of this size.

    Where the run's device is not here (the GPU workers of a cluster whose head has none), nothing can be measured: float32 and
    fused attention; likewise without ``measure``.

    Raises:
        UserError: bfloat16 was asked for, and the model cannot run in it."""
    training, evaluation = config.training, config.evaluation
    device, size = torch.device(training.device), training.cohort_size
    pinned = None if training.attention == "auto" else config.attention_kernels
    choice = ComputeChoice("float32", config.attention_kernels, {})
    if device.type == "cpu" or torch.cuda.is_available():
        assert isinstance(size, int), "cohort_size is resolved"
        assert isinstance(model, LoraStack | FunctionalStack)
        model.backbone.to(device)
        params = to_parameters(stack_states(states[:size]), device, torch.float32)
        if measure and "auto" in (training.precision, training.attention, evaluation.precision):
            choice = fastest(model, params, image_size, device, config.cluster.threads_per_actor, pinned)
        low: Alternative = ("bfloat16", choice.attention.bfloat16)
        for key, asked in (("training", training.precision), ("evaluation", evaluation.precision)):
            if asked == "bfloat16" and not can_run(model, params, image_size, device, low):
                fix = f"{config.backbone.name} cannot run in it; use float32 or auto"
                raise UserError(f"{key}.precision", asked, fix)
    precisions = [
        choice.precision if asked == "auto" else asked for asked in (training.precision, evaluation.precision)
    ]
    return config.model_copy(
        update={
            "training": training.model_copy(update={"precision": precisions[0], "attention": choice.attention}),
            "evaluation": evaluation.model_copy(update={"precision": precisions[1]}),
        }
    )

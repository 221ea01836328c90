"""Resolve every ``auto`` that a result depends on, once, before a run starts.

`resolve_config` decides what needs no measurement, and assumes float32 and fused attention for the rest.
`measure_choices` replaces these assumptions by what is fastest on this machine.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig, ResolvedEvaluation, ResolvedTraining
from sylva_ray.config.training import AttentionKernels, Windows
from sylva_ray.core.errors import UserError
from sylva_ray.core.gpu import driver_version
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import ClientState, stack_states
from sylva_ray.models.cohort import FunctionalStack, to_parameters
from sylva_ray.models.compute_choice import Alternative, can_run, fastest
from sylva_ray.models.device_memory import use_expandable_segments

if TYPE_CHECKING:
    from sylva_ray.models.lora import LoraStack

NO_GPU = "this machine has no GPU; use cpu or auto"
"""What to do where ``training.device`` is ``cuda`` and there is none."""

MAX_AUTO_COHORT_SIZE = 8
"""Clients in one stacked forward, at most, where ``training.cohort_size`` is ``auto``."""


def resolve_config(config: ExperimentConfig) -> ResolvedConfig:
    """Resolve every ``auto`` without a measurement: unmeasured choices become float32 and fused attention.

    Raises:
        UserError: a GPU was asked for, and this machine, on which the run is to start Ray, has none.
    """
    training, evaluation = config.training, config.evaluation
    attention = AttentionKernels() if training.attention == "auto" else kernels_of(training.attention)
    decided_training = {
        "device": resolve_device(config),
        "cohort_size": resolve_cohort_size(config),
        "precision": "float32" if training.precision == "auto" else training.precision,
        "attention": attention,
        "windows": Windows() if training.windows == "auto" else training.windows,
    }
    decided_evaluation = {"precision": "float32" if evaluation.precision == "auto" else evaluation.precision}
    sections = {
        "training": ResolvedTraining(**dict(training) | decided_training),
        "evaluation": ResolvedEvaluation(**dict(evaluation) | decided_evaluation),
    }
    return ResolvedConfig(**dict(config) | sections)


def kernels_of(attention: Literal["fused", "plain"] | AttentionKernels) -> AttentionKernels:
    """Return the attention kernel of each precision, where one name stands for both."""
    if isinstance(attention, AttentionKernels):
        return attention
    return AttentionKernels(float32=attention, bfloat16=attention)


def resolve_device(config: ExperimentConfig) -> Literal["cpu", "cuda"]:
    """Return the device that the clients' work runs on.

    ``auto`` is a GPU where actors ask for one and this machine has one. The head of a cluster need not have a GPU
    itself, so there the actors' request decides alone.

    Raises:
        UserError: ``cuda`` was asked for on a machine without a GPU.
    """
    cluster, device = config.cluster, config.training.device
    if device == "auto":
        on_other_machines = cluster.pool == "ray" and cluster.address is not None
        is_wanted = cluster.gpus_per_actor > 0 or cluster.pool == "in_process"
        return "cuda" if is_wanted and (on_other_machines or local_device("auto") == "cuda") else "cpu"
    return local_device(device) if cluster.address is None else device


def local_device(device: Literal["cpu", "cuda", "auto"]) -> Literal["cpu", "cuda"]:
    """Return the device that this machine computes on; ``auto`` is a GPU if there is one.

    Raises:
        UserError: ``cuda`` was asked for on a machine without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device", "cuda", _why_no_gpu())
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _why_no_gpu() -> str:
    """Return what to do where PyTorch finds no GPU: there is none, or its driver is too old."""
    driver = driver_version()
    if driver is None or torch.version.cuda is None:
        return NO_GPU
    return (
        f"PyTorch for CUDA {torch.version.cuda} cannot use the GPU with driver {driver}: update the driver, or use cpu"
    )


def check_device(device: Literal["cpu", "cuda", "auto"]) -> None:
    """Check what `local_device` checks, as far as that needs no PyTorch: whether there is a driver of a GPU.

    Raises:
        UserError: ``cuda`` was asked for on a machine without one.
    """
    if device == "cuda" and not may_have_gpu():
        raise UserError("training.device", "cuda", NO_GPU)


def may_have_gpu() -> bool:
    """Return False if this machine has no driver of a GPU."""
    if sys.platform != "linux" or Path("/dev/kfd").exists():  # AMD's driver
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def resolve_cohort_size(config: ExperimentConfig) -> int:
    """Return the number of clients in one stacked forward.

    ``auto`` gives an even number of cohorts, which keeps two workers busy, of at most `MAX_AUTO_COHORT_SIZE` clients
    each.
    """
    if config.cluster.num_actors == "per_client":
        return 1
    if config.training.cohort_size != "auto":
        return config.training.cohort_size
    participants = config.training.clients_per_round or config.partition.num_clients
    num_cohorts = 2 * -(-participants // (2 * MAX_AUTO_COHORT_SIZE))
    return -(-participants // num_cohorts)


def resolve_trial(config: ExperimentConfig) -> ExperimentConfig:
    """Resolve what a trial of a sweep decides differently from a run of its own: the trials share one cluster.

    ``cluster.num_actors`` and ``training.cohort_size`` become numbers. A device of ``auto`` is the CPU where the
    trial's actors reserve no GPU: their processes see every GPU of their node, also those that other trials reserved.
    """
    device = config.training.device
    if device == "auto" and config.cluster.gpus_per_actor == 0:
        device = "cpu"
    cluster = config.cluster.model_copy(update={"num_actors": trial_actors(config)})
    training = config.training.model_copy(update={"device": device, "cohort_size": resolve_cohort_size(config)})
    return config.model_copy(update={"training": training, "cluster": cluster})


def resolve_trial_device(config: ExperimentConfig) -> ExperimentConfig:
    """Resolve the device that `resolve_trial` left open: a trial whose actors reserve GPUs computes on them."""
    if config.training.device != "auto":
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"device": "cuda"})})


def trial_actors(config: ExperimentConfig) -> int:
    """Return the client actors of one trial: 1 for ``auto``, as trials share the cluster; at most one per cohort."""
    if config.cluster.pool == "in_process" or config.cluster.num_actors == "auto":
        return 1
    clients = config.partition.num_clients
    if config.cluster.num_actors == "per_client":
        return clients
    return min(-(-clients // resolve_cohort_size(config)), config.cluster.num_actors)


def measure_choices(
    asked: ExperimentConfig,
    resolved: ResolvedConfig,
    model: LoraStack | FunctionalStack,
    states: Sequence[ClientState],
    image_size: int,
    measure: bool = True,
) -> ResolvedConfig:
    """Choose the precisions and attention kernels that are fastest here for a cohort, where ``asked`` says ``auto``.

    Nothing can be measured where the run's device is not on this machine (the GPU workers of a cluster whose head has
    none): ``resolved`` is returned as it is; likewise without ``measure``.

    Args:
        asked: the configuration of the user.
        resolved: `resolve_config` of it.
        model: on the CPU; it is moved to the device.
        states: what the K clients start from.
        image_size: side of the data set's images in pixels.
        measure: whether to measure.

    Raises:
        UserError: bfloat16 was asked for, and the model cannot run in it.
    """
    training, device = resolved.training, torch.device(resolved.training.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return resolved
    if device.type == "cuda":
        use_expandable_segments()
    model.backbone.to(device)
    params = to_parameters(stack_states(states[: training.cohort_size]), device, torch.float32)
    precision, attention = "float32", training.attention
    if measure and "auto" in (asked.training.precision, asked.training.attention, asked.evaluation.precision):
        pinned = None if asked.training.attention == "auto" else attention
        choice = fastest(model, params, image_size, device, resolved.cluster.threads_per_actor, pinned, training.tf32)
        precision, attention = choice.precision, choice.attention
    low: Alternative = ("bfloat16", attention.bfloat16)
    for key, wanted in (("training", asked.training.precision), ("evaluation", asked.evaluation.precision)):
        if wanted == "bfloat16" and not can_run(model, params, image_size, device, low):
            fix = f"{resolved.backbone.name} cannot run in it; use float32 or auto"
            raise UserError(f"{key}.precision", wanted, fix)
    precisions = {
        "training": precision if asked.training.precision == "auto" else training.precision,
        "evaluation": precision if asked.evaluation.precision == "auto" else resolved.evaluation.precision,
    }
    sections = {
        "training": training.model_copy(update={"precision": precisions["training"], "attention": attention}),
        "evaluation": resolved.evaluation.model_copy(update={"precision": precisions["evaluation"]}),
    }
    return resolved.model_copy(update=sections)

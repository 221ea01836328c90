"""The configuration of a run in which no choice is left open.

`sylva_ray.preparation.resolve` makes it from an `ExperimentConfig`. Everything that computes takes this type, so that a
setting which may still be ``auto`` cannot reach it. The keys and values in YAML are those of `ExperimentConfig`.
"""

from __future__ import annotations

from typing import Literal

from sylva_ray.config.experiment import EvaluationSection, ExperimentConfig
from sylva_ray.config.training import AttentionKernels, TrainingSection, Windows
from sylva_ray.core.sections import Count


class ResolvedTraining(TrainingSection):
    """The section ``training`` with a device, a cohort size, a precision, attention kernels and windows."""

    cohort_size: Count
    precision: Literal["float32", "bfloat16"]
    attention: AttentionKernels
    windows: Windows
    device: Literal["cpu", "cuda"]


class ResolvedEvaluation(EvaluationSection):
    """The section ``evaluation`` with a precision."""

    precision: Literal["float32", "bfloat16"]


class ResolvedConfig(ExperimentConfig):
    """One experiment, every setting that its result depends on decided.

    Only ``cluster.num_actors`` and ``cluster.memory_per_actor`` may still be ``auto``: they depend on the nodes that a
    cluster has when the run starts, and no result depends on them (on the memory, only before the windows are planned).
    """

    training: ResolvedTraining
    evaluation: ResolvedEvaluation

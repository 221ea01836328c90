"""What is assumed of GPUs that are not on this machine: those of the workers of a cluster whose head has none.

A run is planned before it connects to Ray, and an autoscaler may not have added a worker yet. Ray would not say enough,
either: to it, an A100 with 40 GB and one with 80 GB are of one type. So a user is told what was assumed.
"""

from __future__ import annotations

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.lazy import torch
from sylva_ray.preparation.memory_budget import UNKNOWN_GPU_BYTES


def assumptions(asked: ExperimentConfig, resolved: ResolvedConfig) -> tuple[str, ...]:
    """Return what is assumed where ``asked`` says ``auto`` and nothing can be measured here, and how to set it.

    Args:
        asked: the configuration of the user; in a resume with the choices of its run, so nothing is said again.
        resolved: the same, everything resolved.

    Returns:
        One sentence per assumption; none on a CPU or on a machine with a GPU.
    """
    if resolved.training.device != "cuda" or torch.cuda.is_available():
        return ()
    found = []
    if asked.training.windows == "auto" and asked.cluster.memory_per_actor == "auto":
        found.append(
            f"this machine has no GPU: the windows are planned for cards with {UNKNOWN_GPU_BYTES / 2**30:.0f} GiB "
            "(L4, A10G); for others set cluster.memory_per_actor, by the smallest card that an actor may get"
        )
    sections = {"training": asked.training.precision, "evaluation": asked.evaluation.precision}
    keys = [f"{name}.precision" for name, precision in sections.items() if precision == "auto"]
    if keys:
        found.append(
            f"this machine has no GPU, on which a precision could be measured: {' and '.join(keys)} = auto became "
            "float32; cards from Ampere on (A10G, L4, A100, H100) are faster with bfloat16"
        )
    return tuple(found)

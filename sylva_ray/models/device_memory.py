"""What a process may use of its GPU, and how numbers get there.

Ray counts shares of a GPU and isolates nothing, so every process limits itself.
"""

from __future__ import annotations

import os

from sylva_ray.config.cluster import ClusterSection
from sylva_ray.core.lazy import torch

GPU_PROCESS_BYTES = 600_000_000
"""Of a GPU, what a process uses besides its tensors: the CUDA context and the libraries' workspaces."""

RESIDENT_SHARE = 0.1
"""Fraction of a GPU's free memory, or of a process's share of it, that images may take up for good."""


def gpu_share(section: ClusterSection) -> float:
    """Return the share of one GPU that a process has, in (0, 1]."""
    if section.pool == "in_process" or section.gpus_per_actor == 0:
        return 1.0
    return min(1.0, section.gpus_per_actor)


def use_expandable_segments() -> None:
    """Let the allocator of GPU memory grow its segments, so that windows of many sizes do not fragment it.

    It has an effect only before the first tensor on a GPU, and none where the user configures the allocator.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & set(os.environ):  # not read if the one with CUDA is set
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def enforce_share(device: torch.device, section: ClusterSection) -> None:
    """Limit the tensors of this process to its share of the GPU, or to ``cluster.memory_per_actor``.

    What exceeds it is out of memory, as on a smaller card. On a CPU nothing is done.
    """
    if device.type != "cuda":
        return
    use_expandable_segments()
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = gpu_share(section) * total
    if section.memory_per_actor != "auto":
        allowed = min(allowed, section.memory_per_actor)
    fraction = max(0.01, (allowed - GPU_PROCESS_BYTES) / total)
    torch.cuda.set_per_process_memory_fraction(fraction)  # of the current GPU: it refuses a device without an index


def can_be_resident(num_bytes: int, device: torch.device) -> bool:
    """Return whether images of this size may lie on a GPU as long as they are needed; never on a CPU."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return num_bytes <= RESIDENT_SHARE * min(free, total * torch.cuda.get_per_process_memory_fraction())


def to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device, to a GPU from pinned memory: the program goes on while the GPU computes and copies."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value


def peak_gpu_bytes(device: torch.device) -> int:
    """Return the most that tensors of this process used of its GPU so far; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0

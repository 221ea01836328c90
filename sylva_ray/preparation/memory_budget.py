"""How much memory an actor may use: what the user says, or its share of its GPU or of the RAM of its node."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.lazy import torch
from sylva_ray.models.device_memory import gpu_share

RAM_FRACTION, GPU_FRACTION = 0.75, 0.9
"""Of a node's RAM for its actors, the rest being for the coordinator and the object store; of a GPU's free memory."""

UNKNOWN_GPU_BYTES = 22 * 2**30
"""Free memory of the GPU of a cluster whose head has none: what a card of 24 GB has (L4, A10G)."""

CPU_PROCESS_BYTES = 1_000_000_000
"""RAM that a process uses before a model is loaded: torch, timm and Ray."""


def actor_budget(config: ResolvedConfig) -> int:
    """Return the bytes that an actor may use: of its GPU, or of the RAM of its node.

    On a GPU, ``auto`` is the actor's share of the whole card, but no more than is free. It is not a share of what is
    free, of which actors that began earlier, such as those of other trials of a sweep, hold a part already.

    Raises:
        UserError: ``cluster.memory_per_actor`` is more than there is.
    """
    section, asked = config.cluster, config.cluster.memory_per_actor
    if config.training.device == "cuda":
        share = gpu_share(section)
        is_here = torch.cuda.is_available()
        free, total = torch.cuda.mem_get_info() if is_here else (UNKNOWN_GPU_BYTES, UNKNOWN_GPU_BYTES)
        if asked == "auto":
            return int(GPU_FRACTION * min(free, share * total))
        if is_here and asked > share * total:
            fix = f"an actor's share (cluster.gpus_per_actor) of this GPU is {size_text(int(share * total))}"
            raise UserError("cluster.memory_per_actor", size_text(asked), fix)
        return asked
    ram = node_memory()
    if asked == "auto":
        return int(RAM_FRACTION * ram / actors_per_node(config))
    if section.address is None and asked > ram:
        raise UserError("cluster.memory_per_actor", size_text(asked), f"this machine has {size_text(ram)}")
    return asked


def actors_per_node(config: ExperimentConfig) -> int:
    """Return how many actors share the RAM of a node like this one, on which they run on CPUs."""
    section, num_clients = config.cluster, config.partition.num_clients
    if section.pool == "in_process":
        return 1
    fitting = max(1, int((os.cpu_count() or 1) // section.cpus_per_actor))
    size = config.training.cohort_size
    cohorts = num_clients if size == "auto" else -(-num_clients // size)
    wanted = {"auto": cohorts, "per_client": num_clients}.get(str(section.num_actors), section.num_actors)
    return max(1, min(fitting, int(wanted)))


def node_memory() -> int:
    """Return the bytes of RAM of this machine, or of the container that limits this process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            memory = min(memory, int(limit))
    return memory


def resident_bytes() -> int:
    """Return the resident memory of this process now, after what is free was given back to the system."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):  # not Linux, or another C library
        return CPU_PROCESS_BYTES


def size_text(num_bytes: int) -> str:
    """Return a size in words.

    >>> size_text(1_530_000_000), size_text(74_000_000), size_text(465_528)
    ('1.53 GB', '74 MB', '466 kB')
    """
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"

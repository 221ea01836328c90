"""Part 0: what the device can do, and which flags are set."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import partial

import timm
import torch

from benchmarks.gpu.lab import Lab, Line
from sylva_ray.core.gpu import driver_version
from sylva_ray.models.kernels import deterministic_kernels


def rates(lab: Lab) -> Iterator[Line]:
    """Yield hardware and versions, the rates of matrix products and copies, and the flags of a worker's process."""
    yield {
        "item": "versions",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    yield {"item": "hardware", **hardware(lab)}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        yield {"item": f"product {name}", "tflops": round(product_rate(lab, dtype) / 1e12, 3)}
    yield {"item": "copy", **copy_rates(lab)}
    deterministic_kernels(torch.device(lab.device))
    yield {"item": "flags", **flags(lab)}


def hardware(lab: Lab) -> Line:
    """Return the name of the device; of a GPU also memory, architecture, CUDA and driver."""
    if not lab.is_cuda:
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def product_rate(lab: Lab, dtype: torch.dtype) -> float:
    """Return the FLOP/s of one large square matrix product of random numbers; of equal ones a card is faster."""
    side = 8192 if lab.is_cuda else 512 if lab.reduced else 1024
    a = torch.randn(side, side, device=lab.device).to(dtype)
    return 2 * side**3 / lab.best(lambda: a @ a)


def copy_rates(lab: Lab) -> Line:
    """Return the GB/s of copies on the device, and of those to it from pageable and from pinned memory."""
    size = (256 if lab.is_cuda else 16) * 2**20
    on_device, pageable = torch.zeros(size, dtype=torch.uint8, device=lab.device), torch.zeros(size, dtype=torch.uint8)
    target = torch.empty_like(on_device)
    sources = {"device": on_device, "pageable": pageable}
    if lab.is_cuda:
        sources["pinned"] = pageable.pin_memory()
    return {
        f"{name}_gb_s": round(size / lab.best(partial(target.copy_, source)) / 1e9, 1)
        for name, source in sources.items()
    }


def flags(lab: Lab) -> Line:
    """Return the settings that decide about bits; on a GPU, products in TF32 would not be float32."""
    tf32 = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fills_new_tensors": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "tf32": tf32,
        "holds": torch.are_deterministic_algorithms_enabled() and not any(tf32.values()) if lab.is_cuda else None,
    }

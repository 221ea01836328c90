"""The floating-point format of a model's forward passes."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from sylva_ray.core.lazy import torch


class HasPrecision(Protocol):
    """A model with an attribute ``precision``, the floating-point format of its forward passes."""

    precision: torch.dtype


def torch_dtype(precision: str) -> torch.dtype:
    """Return torch's type for a precision of the configuration, ``float32`` or ``bfloat16``."""
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


@contextmanager
def at_precision(model: HasPrecision, precision: torch.dtype | None) -> Iterator[None]:
    """Set the precision of the model inside the ``with`` block; None leaves it unchanged."""
    if precision is None:
        yield
        return
    before, model.precision = model.precision, precision
    try:
        yield
    finally:
        model.precision = before


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether this machine's device has instructions for bfloat16; others emulate it, which is slower.

    A GPU that is not on this machine, and a processor other than x86, are assumed to have them.
    """
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision_notices(precisions: Mapping[str, str], device: str) -> list[str]:
    """Return what a user should know about precisions that this machine is not made for.

    Args:
        precisions: ``{key of the configuration: precision}``.
        device: ``cpu`` or ``cuda``.
    """
    keys = [key for key, precision in precisions.items() if precision == "bfloat16"]
    if not keys or computes_bfloat16(torch.device(device)):
        return []
    what = "this GPU (older than Ampere)" if device == "cuda" else "this processor (no AVX512-BF16, no AMX)"
    return [f"{' and '.join(keys)} = bfloat16: slow, because {what} has no instructions for it; use float32 or auto"]

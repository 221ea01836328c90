"""The floating-point format of a model's forward passes."""

from __future__ import annotations

from collections.abc import Iterator
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

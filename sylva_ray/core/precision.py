"""In which floating-point format a model's forwards compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from sylva_ray.core.lazy import torch


class HasPrecision(Protocol):
    """A model whose forwards compute in ``precision``."""

    precision: torch.dtype


@contextmanager
def at_precision(model: HasPrecision, precision: torch.dtype | None) -> Iterator[None]:
    """Run the model's forwards in ``precision`` inside the block; None: in the one it has."""
    if precision is None:
        yield
        return
    before, model.precision = model.precision, precision
    try:
        yield
    finally:
        model.precision = before

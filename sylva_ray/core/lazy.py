"""A stand-in for ``torch`` that imports PyTorch when it is first used.

    from sylva_ray.core.lazy import torch

The settings of attacks are in the same files as the attacks, so that reading a configuration imports them. With this
module, commands that compute nothing do not load PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _LazyModule("torch")


def without_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function as ``torch.no_grad()`` does, without importing PyTorch before the function is called."""

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        with torch.no_grad():
            return function(*arguments, **options)

    return call

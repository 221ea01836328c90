"""PyTorch, loaded by its first use: a command that only reads a configuration does not wait for it.

    from sylva_ray.core.lazy import torch

The settings of attacks stand beside the code that runs them, so reading a configuration imports that code too.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _LazyModule("torch")

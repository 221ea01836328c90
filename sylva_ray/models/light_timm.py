"""timm, imported without two libraries that it imports and that nothing here uses.

torchvision, which timm needs, imports PyTorch's compiler for one of its operators, and timm itself does for a decorator
that excludes functions from compiling. timm also imports Weights & Biases where that is installed. Together they take
more than half of the CPU seconds that a process spends on ``import timm``, and every worker is a process. While timm is
imported, empty modules stand in for them; afterwards they can be imported as always.

Two things stay: timm's functions that exclude themselves from compiling (in NaFlexViT) do not, and its
``update_summary`` fails if it is to log to Weights & Biases. Import this module before threads import either library.
"""

# ruff: noqa: E402 (timm is imported after what prepares its import)

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

__all__ = [
    "DropPath",
    "LayerNorm",
    "LayerNormFp32",
    "VisionTransformer",
    "resample_abs_pos_embed",
    "resolve_model_data_config",
    "timm",
]

COMPILER, COMPILER_UTILS, WANDB = "torch._dynamo", "torch._dynamo.utils", "wandb"


@contextmanager
def _without_compiler_and_wandb() -> Iterator[None]:
    """Let modules that are not imported yet be imported as empty ones while the block lasts."""
    compiler, utils = ModuleType(COMPILER), ModuleType(COMPILER_UTILS)
    compiler.__path__ = []  # a package
    vars(compiler)["disable"] = _unchanged
    vars(utils)["is_compile_supported"] = _is_compile_supported
    stand_ins = {COMPILER: compiler, COMPILER_UTILS: utils, WANDB: None}  # None: it raises ImportError
    if COMPILER in sys.modules:
        stand_ins = {WANDB: None}
    added = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(added)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def _unchanged(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    """Stand in for ``torch._dynamo.disable``, also as a decorator with arguments."""
    return _unchanged if function is None else function


def _is_compile_supported(device_type: str) -> bool:
    """Call the function that this one stands in for."""
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


with _without_compiler_and_wandb(), suppress(ImportError, AttributeError):  # of a version that needs more of them
    import timm

import timm
from timm.data.config import resolve_model_data_config
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm, LayerNormFp32
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

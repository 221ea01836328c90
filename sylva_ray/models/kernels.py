"""The kernels of a backbone's attention.

They change the last bits of what is computed and nothing else. `sylva_ray.models.compute_choice` measures which is
faster.
"""

from __future__ import annotations

import os
from typing import Literal

from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.lazy import torch

Kernel = Literal["fused", "plain"]


def deterministic_kernels(device: torch.device, tf32: bool = False) -> None:
    """Set up this process so that equal inputs give equal bits, as workers do.

    Args:
        device: that computes.
        tf32: whether a GPU may round the factors of float32 products, and of convolutions, to 10 bits.
    """
    torch.set_deterministic_debug_mode("error")  # like use_deterministic_algorithms, which imports the compiler
    # It would fill new tensors, to find code that reads before it writes, at the cost of 199 fills in a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed by deterministic cuBLAS
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32


class AttentionSwitch:
    """Selects the kernel of all attention layers of a timm model; its length is the number of these layers.

    Args:
        model: the timm model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = [layer for layer in model.modules() if hasattr(layer, "fused_attn")]

    def __len__(self) -> int:
        return len(self._layers)

    def use(self, kernels: AttentionKernels, precision: torch.dtype) -> None:
        """Select the kernel for ``precision``; float64, which tests of exactness use, has that of float32."""
        kernel = kernels.bfloat16 if precision == torch.bfloat16 else kernels.float32
        for layer in self._layers:
            layer.fused_attn = kernel == "fused"  # type: ignore[assignment]

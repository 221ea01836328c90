"""The kernels of a backbone: its attention, and its patch embedding as a matrix product.

They change the last bits of what is computed and nothing else. `sylva_ray.models.compute_choice` measures which is
faster.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from sylva_ray.config.experiment import AttentionKernels

Kernel = Literal["fused", "plain"]

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Torch's types of the precisions in a configuration."""


def deterministic_kernels(device: torch.device) -> None:
    """Set up this process so that equal inputs give equal bits, as workers do."""
    torch.use_deterministic_algorithms(True)
    # It would fill new tensors, to find code that reads before it writes, at the cost of 199 fills in a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed by deterministic cuBLAS
        torch.backends.cuda.matmul.allow_tf32 = False


class AttentionSwitch:
    """Selects the kernel of all attention layers of a timm model; its length is the number of these layers.

    Args:
        model: the timm model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for layer in model.modules() if hasattr(layer, "fused_attn")]

    def __len__(self) -> int:
        return len(self._layers)

    def use(self, kernels: AttentionKernels, precision: torch.dtype) -> None:
        """Select the kernel for ``precision``; float64, which tests of exactness use, has that of float32."""
        kernel = kernels.bfloat16 if precision == torch.bfloat16 else kernels.float32
        for layer in self._layers:
            layer.fused_attn = kernel == "fused"  # type: ignore[assignment]


class PatchProjection(nn.Module):
    """A convolution whose stride equals its kernel size, as one matrix product.

    It has the convolution's parameters, under the same names, so state_dicts do not change. It computes in their
    precision, also under autocast: an attack moves a pixel by less than bfloat16 resolves.

    Args:
        convolution: the convolution, with kernel ``p x q`` and ``d`` outputs.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project ``[N, c, H, W]`` to ``[N, d, H / p, W / q]``."""
        (_, _, p, q), (n, channels, height, width) = self.weight.shape, x.shape
        rows, columns = height // p, width // q
        patches = x[:, :, : rows * p, : columns * q].reshape(n, channels, rows, p, columns, q)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(n, rows, columns, channels * p * q)
        with torch.autocast(x.device.type, enabled=False):
            tokens = F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)
        return tokens.permute(0, 3, 1, 2)


def project_patches(model: nn.Module) -> None:
    """Replace the patch embedding of a timm model by a `PatchProjection` if its patches do not overlap."""
    embedding = getattr(model, "patch_embed", None)
    convolution = getattr(embedding, "proj", None)
    if not isinstance(convolution, nn.Conv2d) or not isinstance(embedding, nn.Module):
        return
    is_tiling = convolution.stride == convolution.kernel_size and convolution.padding in ((0, 0), 0, "valid")
    if is_tiling and convolution.dilation == (1, 1) and convolution.groups == 1:
        embedding.proj = PatchProjection(convolution)

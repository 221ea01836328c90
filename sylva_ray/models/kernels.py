"""How a backbone computes: its attention kernel, and its patch embedding as a matrix product.

Neither changes what is computed but for the last bits. `sylva_ray.models.compute_choice` measures which kernel is faster.
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
"""Torch's names of the precisions in a config."""


def deterministic_kernels(device: torch.device) -> None:
    """Settings of the process under which the same inputs give the same bits: a worker computes, and is measured, under them."""
    torch.use_deterministic_algorithms(True)
    # A guard against reading what nobody wrote, which nothing of ours does; it would cost 199 fills in a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
        torch.backends.cuda.matmul.allow_tf32 = False


class AttentionSwitch:
    """The attention layers of a timm model, all of whose kernels are set together."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for layer in model.modules() if hasattr(layer, "fused_attn")]

    def __len__(self) -> int:
        return len(self._layers)

    def use(self, kernels: AttentionKernels, precision: torch.dtype) -> None:
        """Compute attention by the kernel for ``precision`` from now on (float64, of exactness tests, has float32's)."""
        kernel = kernels.bfloat16 if precision == torch.bfloat16 else kernels.float32
        for layer in self._layers:
            layer.fused_attn = kernel == "fused"  # type: ignore[assignment]


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product: ``[N, c, H, W]`` -> ``[N, d, H / p, W / q]``.

    It shares the convolution's parameters, under the same names, so state_dicts stay as they are. It computes in their
    precision, also under autocast: an attack moves a pixel by less than bfloat16 resolves."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (_, _, p, q), (n, channels, height, width) = self.weight.shape, x.shape
        rows, columns = height // p, width // q
        patches = x[:, :, : rows * p, : columns * q].reshape(n, channels, rows, p, columns, q)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(n, rows, columns, channels * p * q)
        with torch.autocast(x.device.type, enabled=False):
            tokens = F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)
        return tokens.permute(0, 3, 1, 2)


def project_patches(model: nn.Module) -> None:
    """Replace a timm patch embedding of non-overlapping patches by a `PatchProjection`, where the model has one."""
    embedding = getattr(model, "patch_embed", None)
    convolution = getattr(embedding, "proj", None)
    if not isinstance(convolution, nn.Conv2d) or not isinstance(embedding, nn.Module):
        return
    is_tiling = convolution.stride == convolution.kernel_size and convolution.padding in ((0, 0), 0, "valid")
    if is_tiling and convolution.dilation == (1, 1) and convolution.groups == 1:
        embedding.proj = PatchProjection(convolution)

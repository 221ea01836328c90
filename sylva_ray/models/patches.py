"""The patch embedding of a backbone as a matrix product, which changes only the last bits of what is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


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

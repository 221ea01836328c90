"""The patch embedding of a backbone as a matrix product, which changes only the last bits of what is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PatchProjection(nn.Conv2d):
    """A convolution whose stride equals its kernel size, as one matrix product.

    It has the convolution's parameters, under the same names, so state_dicts do not change. It computes in their
    precision, also under autocast: an attack moves a pixel by less than bfloat16 resolves. It is made like a
    convolution, because PEFT makes its own layers of the class that it adapts.
    """

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> PatchProjection:
        """Return the projection that shares the parameters of a convolution."""
        (d, channels, p, q), has_bias = convolution.weight.shape, convolution.bias is not None
        projection = cls(channels, d, (p, q), (p, q), bias=has_bias, device="meta")
        projection.weight, projection.bias = convolution.weight, convolution.bias
        return projection

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
        embedding.proj = PatchProjection.of(convolution)

"""Bilinear resizing as two matrix products, whose gradient is deterministic on a GPU, too.

The gradient of torch's own kernel is not: in deterministic mode it is replaced by one of scattered additions.
"""

from __future__ import annotations

import torch
from torch import nn


def resize_matrix(size: int, target: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix ``[target, size]`` that resizes an axis as torch's bilinear interpolation in ``dtype`` does."""
    rows = torch.eye(size, dtype=dtype)[None, :, None]  # every row of pixels is an image of height 1
    resized = nn.functional.interpolate(rows, size=(1, target), mode="bilinear")
    return resized[0, :, 0].T.contiguous()


class Resize(nn.Module):
    """Resizes images to ``side`` pixels squared; matrices are made for every size of images that is seen.

    Args:
        side: of the result, in pixels.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self._matrices: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Resize ``[N, 3, H, W]``; images of the right size are returned as they are."""
        height, width = x.shape[-2:]
        if width != self.side:
            x = x @ self._matrix(width, x).T
        return x if height == self.side else self._matrix(height, x) @ x

    def _matrix(self, size: int, like: torch.Tensor) -> torch.Tensor:
        key = size, like.device, like.dtype
        if key not in self._matrices:
            self._matrices[key] = resize_matrix(size, self.side, like.dtype).to(like.device)
        return self._matrices[key]

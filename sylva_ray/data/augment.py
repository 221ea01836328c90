"""Augmentation of uint8 image batches, drawn from a generator of the caller's."""

from __future__ import annotations

import numpy as np
import torch

CROP_PADDING = 4
"""Pixels of reflected border for random crops (the usual CIFAR augmentation)."""


def augmented(images: np.ndarray, kind: str, stream: torch.Generator) -> np.ndarray:
    """Random horizontal flips and reflect-padded crops of ``[n, 3, H, W] uint8``, drawn from ``stream``."""
    n, _, height, width = images.shape
    if "flip" in kind:
        flipped = (torch.rand(n, generator=stream) < 0.5).numpy()
        images = np.where(flipped[:, None, None, None], images[..., ::-1], images)
    if "crop" in kind:
        p = CROP_PADDING
        padded = np.pad(images, ((0, 0), (0, 0), (p, p), (p, p)), mode="reflect")
        top, left = torch.randint(0, 2 * p + 1, (2, n), generator=stream).numpy()
        rows = top[:, None] + np.arange(height)
        columns = left[:, None] + np.arange(width)
        images = padded[np.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].transpose(0, 3, 1, 2)
    return images

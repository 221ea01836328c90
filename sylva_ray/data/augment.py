"""Random flips and crops of batches of uint8 images."""

from __future__ import annotations

import numpy as np

from sylva_ray.core.lazy import torch

CROP_PADDING = 4
"""Pixels of reflected border around an image before a random crop, as is usual for CIFAR."""


def augmented(images: np.ndarray, kind: str, stream: torch.Generator) -> np.ndarray:
    """Flip and crop images at random.

    Args:
        images: ``[n, 3, H, W] uint8``.
        kind: names the augmentations: ``none``, ``flip``, ``crop`` or ``flip_crop``.
        stream: source of the random numbers.

    Returns:
        ``[n, 3, H, W] uint8``; the images themselves where ``kind`` is ``none``.
    """
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

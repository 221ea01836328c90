"""Random flips and crops of batches of uint8 images, on the device of the images."""

from __future__ import annotations

from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws

CROP_PADDING = 4
"""Pixels of reflected border around an image before a random crop, as is usual for CIFAR."""


def augmented(images: torch.Tensor, kind: str, draws: ImageDraws, stream_index: int = 0) -> torch.Tensor:
    """Flip and crop images at random.

    Args:
        images: ``[n, 3, H, W] uint8``.
        kind: names the augmentations: ``none``, ``flip``, ``crop`` or ``flip_crop``.
        draws: random numbers of the n images.
        stream_index: of the flips; the next one is that of the crops.

    Returns:
        ``[n, 3, H, W] uint8``; the images themselves where ``kind`` is ``none``.
    """
    if kind == "none":
        return images
    n, channels, height, width = images.shape
    top = left = torch.zeros(n, 1, dtype=torch.long, device=images.device)
    if "crop" in kind:
        corner = (draws.uniform(stream_index + 1, (2,)) * (2 * CROP_PADDING + 1)).long() - CROP_PADDING
        top, left = corner[:, :1], corner[:, 1:]
    rows, columns = (
        _reflected(start + torch.arange(size, device=images.device), size)
        for start, size in ((top, height), (left, width))
    )
    if "flip" in kind:
        flips = draws.uniform(stream_index, (1,)) < 0.5
        columns = torch.where(flips, width - 1 - columns, columns)
    image, channel = torch.arange(n, device=images.device), torch.arange(channels, device=images.device)
    return images[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def _reflected(index: torch.Tensor, size: int) -> torch.Tensor:
    """Reflect indices beyond 0..size - 1 at the first and the last one, which are not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()

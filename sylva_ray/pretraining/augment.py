"""Augmentations of pre-training: random resized crops, mixup and cutmix."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from sylva_ray.models.device_memory import to_device


def resized_crops(x: torch.Tensor, smallest: float, stream: torch.Generator) -> torch.Tensor:
    """Crop every image at random and resize the crop to the image's size (Szegedy et al. 2015).

    Args:
        x: ``[n, 3, H, W] in [0, 1]``.
        smallest: smallest area of a crop, as a fraction; the aspect ratio is in [3/4, 4/3].
        stream: source of the random numbers.
    """
    n = len(x)
    area, aspect, right, down = torch.rand(4, n, generator=stream)
    area = smallest + area * (1 - smallest)
    aspect = torch.exp((aspect * 2 - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (right * 2 - 1) * (1 - width), (down * 2 - 1) * (1 - height)
    grid = F.affine_grid(to_device(theta, x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False).clamp(0, 1)


def mixed(
    x: torch.Tensor, target: torch.Tensor, mixup: float, cutmix: float, stream: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend a batch with a permutation of itself, by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019).

    Args:
        x: ``[n, 3, H, W]``.
        target: ``[n, num_classes]``.
        mixup: alpha of the Beta distribution of the ratio; 0: no mixup.
        cutmix: likewise; if both are positive, each batch has one of them at random.
        stream: source of the random numbers.

    Returns:
        The blended images and their targets.
    """
    if mixup == 0 and cutmix == 0:
        return x, target
    use_cutmix = cutmix > 0 and (mixup == 0 or float(torch.rand((), generator=stream)) < 0.5)
    alpha = cutmix if use_cutmix else mixup
    numpy_stream = np.random.default_rng(int(torch.randint(2**62, (), generator=stream)))
    ratio = float(numpy_stream.beta(alpha, alpha))
    partner = to_device(torch.randperm(len(x), generator=stream), x.device)
    if use_cutmix:
        height, width = x.shape[-2:]
        side = math.sqrt(1 - ratio)
        top, left = numpy_stream.integers(height), numpy_stream.integers(width)
        rows = slice(max(0, round(top - side * height / 2)), min(height, round(top + side * height / 2)))
        columns = slice(max(0, round(left - side * width / 2)), min(width, round(left + side * width / 2)))
        x = x.clone()
        x[..., rows, columns] = x[partner][..., rows, columns]
        ratio = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        x = ratio * x + (1 - ratio) * x[partner]
    return x, ratio * target + (1 - ratio) * target[partner]

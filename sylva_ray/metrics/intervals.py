"""Confidence intervals of accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959964
"""Standard normal quantile of two-sided 95 % intervals."""


def wilson_interval(accuracy: float, images: float, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of an accuracy (Wilson 1927).

    Args:
        accuracy: observed, in [0, 1].
        images: on which it was observed; the effective number of a stratified sample need not be whole.
        z: standard normal quantile of the confidence.

    Returns:
        Lower and upper bound.

    >>> [round(bound, 4) for bound in wilson_interval(0.5, 100)]
    [0.4038, 0.5962]
    >>> [round(bound, 4) for bound in wilson_interval(0.0, 8)]
    [0.0, 0.3244]
    """
    scale = 1 + z**2 / images
    centre = (accuracy + z**2 / (2 * images)) / scale
    half = z * math.sqrt(accuracy * (1 - accuracy) / images + z**2 / (4 * images**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def fleet_interval(mean: float, images: Sequence[int], distinct: int | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a mean over clients of their accuracies.

    It is over images: how much the mean would vary with other test images of the same clients. It is Wilson's, with the
    number of images on which a mean over all images would vary as much, ``K^2 / sum_i 1 / n_i``; if every client has as
    many images, that is all of them. Then differences between clients make the true interval narrower. Clients may be
    tested on the same images, of which their answers differ little if their models do; so the number is at most that
    of distinct images.

    Args:
        mean: over clients, each of which counts the same.
        images: of each client, at least 1.
        distinct: images without repetition; None: no two clients have the same.

    Returns:
        Lower and upper bound.
    """
    effective = effective_images(images)
    return wilson_interval(mean, effective if distinct is None else min(effective, distinct))


def effective_images(images: Sequence[int]) -> float:
    """Return the number of images of one client whose accuracy would vary as much as the mean over these clients.

    Args:
        images: of each client, at least 1.

    >>> effective_images([50, 50]), round(effective_images([10, 90]), 1)
    (100.0, 36.0)
    """
    return float(len(images) ** 2 / sum(1 / n for n in images))

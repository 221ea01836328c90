"""Certified radii from predictions under Gaussian noise.

Source: Cohen et al. 2019, "Certified Adversarial Robustness via Randomized Smoothing", theorem 1 and CERTIFY.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, norm

ABSTAINS = -1
"""The class of an image without certificate."""


def certificates(
    guess: np.ndarray, hits: np.ndarray, num_draws: int, sigma: float, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Compute certified classes and L2 radii.

    The radius is sigma Phi^-1(p), where p is a lower confidence bound of the probability of the class under noise.

    Args:
        guess: the selected class of each image, ``[n]``.
        hits: how many of ``num_draws`` draws predict that class, ``[n]``.
        num_draws: number of draws per image.
        sigma: standard deviation of the noise, in pixel units.
        alpha: a certificate is wrong with at most this probability, per image.

    Returns:
        Classes ``[n]``, `ABSTAINS` where p is at most 1/2, and radii ``[n]``.
    """
    bounds = np.array([lower_bound(int(count), num_draws, alpha) for count in hits])
    certain = bounds > 0.5
    radii = np.where(certain, sigma * norm.ppf(np.where(certain, bounds, 0.5)), 0.0)
    return np.where(certain, guess, ABSTAINS), radii


def lower_bound(hits: int, trials: int, alpha: float) -> float:
    """Return the one-sided lower Clopper-Pearson bound of a proportion at confidence 1 - alpha."""
    test = binomtest(hits, trials, alternative="greater")
    return float(test.proportion_ci(confidence_level=1 - alpha, method="exact").low)


def certified_accuracy(
    classes: np.ndarray, radii: np.ndarray, labels: np.ndarray, levels: Sequence[float]
) -> list[float]:
    """Compute the fraction of images that are classified correctly with at least each of some radii.

    Args:
        classes: certified class of each image, or `ABSTAINS`, ``[n]``.
        radii: certified L2 radius of each image, in pixel units, ``[n]``.
        labels: ``[n]``.
        levels: radii, in pixel units.

    Returns:
        One fraction in [0, 1] per level.
    """
    right = classes == labels
    return [float(np.mean(right & (radii >= level))) for level in levels]

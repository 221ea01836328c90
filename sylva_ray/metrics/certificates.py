"""From votes under noise to a radius that no attack can break (Cohen et al. 2019, Theorem 1 and CERTIFY)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, norm

ABSTAINS = -1


def certificates(
    guess: np.ndarray, hits: np.ndarray, num_draws: int, sigma: float, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """``classes [n]`` (`ABSTAINS` where the noise decides) and ``radii [n]`` in L2: sigma Phi^-1(p), p a lower bound of the share
    of the ``num_draws`` that answer the class. Each image's certificate is wrong with probability at most ``alpha``."""
    bounds = np.array([lower_bound(int(count), num_draws, alpha) for count in hits])
    certain = bounds > 0.5
    radii = np.where(certain, sigma * norm.ppf(np.where(certain, bounds, 0.5)), 0.0)
    return np.where(certain, guess, ABSTAINS), radii


def lower_bound(hits: int, trials: int, alpha: float) -> float:
    """Clopper-Pearson, one-sided at confidence 1 - alpha."""
    test = binomtest(hits, trials, alternative="greater")
    return float(test.proportion_ci(confidence_level=1 - alpha, method="exact").low)


def certified_accuracy(
    classes: np.ndarray, radii: np.ndarray, labels: np.ndarray, levels: Sequence[float]
) -> list[float]:
    """Share of images that are classified rightly with a certificate of at least each level."""
    right = classes == labels
    return [float(np.mean(right & (radii >= level))) for level in levels]

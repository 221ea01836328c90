"""From Shapley values to a selection of layers, and the guard's statistics.

``phi[l, 0]`` is layer l's share of the benign gain, ``phi[l, 1]`` its share of the robust *loss*: positive means that refining
this layer costs robustness. A layer is worth refining at price lambda if ``phi[l, 0] - lambda phi[l, 1] > 0``.
"""

from __future__ import annotations

import numpy as np

MAX_GUARD_IMAGES = 1000
"""Guard images that are always enough to decide by oneself."""


def shrink(phi: np.ndarray, neighbours: np.ndarray, num_samples: np.ndarray, strength: float = 64.0) -> np.ndarray:
    """Pull every client's values towards its neighbourhood's mean, the more the fewer images they come from.

    Args:
        phi: ``[K, n, 2]``.
        neighbours: ``[K, K]`` weights, rows sum to 1.
        num_samples: images behind each client's values, ``[K]``.
        strength: images at which own value and mean weigh the same; 0 leaves phi as it is.

    Returns:
        ``[K, n, 2]``: weight n / (n + strength) on the own value, the rest on the mean.
    """
    n = np.asarray(num_samples, float)
    own = (n / (n + strength))[:, None, None]
    return own * phi + (1 - own) * np.einsum("ij,jnc->inc", neighbours, phi)


def nested_candidates(phi: np.ndarray) -> np.ndarray:
    """The selections met as lambda falls from infinity to 0, ``[m, n] bool``: the empty one first, each within the next.

    A layer without benign gain, or with values that are not finite, never enters. The others enter by gain per robust loss;
    those that cost nothing come first, the largest gain leading. There are at most n + 1 selections, and walking them is
    free: phi is linear in lambda.
    """
    gain, cost = phi[:, 0], np.maximum(phi[:, 1], 0.0)
    useful = np.flatnonzero((gain > 0) & np.isfinite(phi).all(1))  # NaN is not "costs nothing"
    price = np.where(cost[useful] > 0, gain[useful] / np.maximum(cost[useful], 1e-300), np.inf)
    order = useful[np.lexsort((useful, -gain[useful], -price))]
    rows = np.zeros((len(order) + 1, len(phi)), bool)
    for size, player in enumerate(order, start=1):
        rows[size:, player] = True
    return rows


def nested_by_score(scores: np.ndarray, threshold: float = -np.inf) -> np.ndarray:
    """The nested selections of the players whose score exceeds ``threshold``, best first, ``[m, n] bool`` from the empty one."""
    useful = np.flatnonzero(scores > threshold)
    order = useful[np.argsort(-scores[useful], kind="stable")]
    rows = np.zeros((len(order) + 1, len(scores)), bool)
    for size, player in enumerate(order, start=1):
        rows[size:, player] = True
    return rows


def paired_upper_bound(lost: int, gained: int, num_images: int, confidence: float) -> float:
    """One-sided upper confidence bound of the net loss (lost - gained) / n of paired outcomes.

    Tango (1998): the largest difference that a score test would not reject. Between -1 and 1; it rises with ``lost``. It is
    approximate, but close for few images and small losses, where Wald's interval is far too hopeful: a candidate whose true
    net loss equals the tolerance passes a 90 % bound with a probability of 0.05 to 0.14 (summed exactly in the tests).
    """
    from scipy import stats  # of phase 2 alone, and slow to import
    from scipy.optimize import brentq

    z, n = stats.norm.ppf(confidence), num_images

    def excess(difference: float) -> float:
        """Of the observed loss, plus z standard errors under ``difference``, over n times ``difference``."""
        b = -lost - gained + (2 * n - lost + gained) * difference
        c = -gained * difference * (1 - difference)
        share_gained = (np.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share_gained + difference * (1 - difference))
        return lost - gained - n * difference + z * np.sqrt(max(variance, 0.0))

    above = (lost - gained) / n + 1e-9  # at the observed loss itself the standard error may be 0
    if above >= 1 or excess(1.0) >= 0:
        return 1.0
    return float(brentq(excess, above, 1.0)) if excess(above) > 0 else above


def images_needed(tolerance: float, confidence: float) -> int:
    """The fewest images with which one flip in each direction passes `paired_upper_bound`: what a guard can work with.

    48 at a tolerance of 0.05 and 90 % confidence, 23 at 0.1. At most `MAX_GUARD_IMAGES`, as for a tolerance of 0."""
    fewest, most = 2, MAX_GUARD_IMAGES
    while fewest < most:  # the bound falls with the number of images
        middle = (fewest + most) // 2
        if paired_upper_bound(1, 1, middle, confidence) <= tolerance:
            most = middle
        else:
            fewest = middle + 1
    return fewest

"""From Shapley values to a selection of layers, and the statistics of the guard.

``phi[l, 0]`` is the part of the benign gain that is due to layer l, ``phi[l, 1]`` the part of the robust *loss*: if it
is positive, refining this layer costs robustness. At price lambda a layer should be refined if ``phi[l, 0] - lambda
phi[l, 1] > 0``.
"""

from __future__ import annotations

import numpy as np

MAX_GUARD_IMAGES = 1000
"""Images with which a client never needs outcomes of others."""

CHANGING = 0.04
"""Share of the images that a typical refinement breaks, and as many that it mends, under attack."""


def shrink(phi: np.ndarray, neighbours: np.ndarray, num_samples: np.ndarray, strength: float = 64.0) -> np.ndarray:
    """Shrink the values of every client towards the mean of its neighbourhood, more for fewer images.

    Args:
        phi: ``[K, n, 2]``.
        neighbours: ``[K, K]`` weights, rows sum to 1.
        num_samples: images that the values of each client are based on, ``[K]``.
        strength: number of images at which a client's value and the mean have equal weights; 0 leaves phi unchanged.

    Returns:
        ``[K, n, 2]``: weight n / (n + strength) for the client's value, the rest for the mean. A client with a value
        that is not finite has none, and does not count in the means of others.
    """
    n = np.asarray(num_samples, float)
    weight = (n / (n + strength))[:, None, None]
    is_finite = np.isfinite(phi).all((1, 2))
    if not is_finite.all():
        total = (neighbours * is_finite).sum(1, keepdims=True)
        weight = np.where(total[..., None] > 0, weight, 1.0)  # nobody to listen to
        neighbours = np.divide(neighbours * is_finite, total, out=np.zeros_like(neighbours), where=total > 0)
        phi = np.where(is_finite[:, None, None], phi, 0.0)
    shrunk = weight * phi + (1 - weight) * np.einsum("ij,jnc->inc", neighbours, phi)
    return np.where(is_finite[:, None, None], shrunk, np.nan)


def nested_candidates(phi: np.ndarray) -> np.ndarray:
    """Return the selections as lambda falls from infinity to 0, ``[m, n] bool``: each within the next, row 0 empty.

    A layer without benign gain, or with values that are not finite, is in none. The others enter in the order of gain
    per robust loss; layers without robust loss come first, in the order of their gain. There are at most n + 1
    selections, since phi is linear in lambda.
    """
    gain, cost = phi[:, 0], np.maximum(phi[:, 1], 0.0)
    useful = np.flatnonzero((gain > 0) & np.isfinite(phi).all(1))  # NaN does not count as "no robust loss"
    price = np.where(cost[useful] > 0, gain[useful] / np.maximum(cost[useful], 1e-300), np.inf)
    order = useful[np.lexsort((useful, -gain[useful], -price))]
    return nested_by_order(order, len(phi))


def nested_by_score(scores: np.ndarray, threshold: float = -np.inf) -> np.ndarray:
    """Return nested selections of the players with a score above ``threshold``, ``[m, n] bool``, row 0 empty."""
    useful = np.flatnonzero(scores > threshold)
    order = useful[np.argsort(-scores[useful], kind="stable")]
    return nested_by_order(order, len(scores))


def nested_by_order(order: np.ndarray, num_players: int) -> np.ndarray:
    """Return the selections of the first 0, 1, ..., m players of ``order [m]``, ``[m + 1, n] bool``."""
    rows = np.zeros((len(order) + 1, num_players), bool)
    for size, player in enumerate(order, start=1):
        rows[size:, player] = True
    return rows


def paired_upper_bound(lost: float, gained: float, num_images: float, confidence: float) -> float:
    """Return a one-sided upper confidence bound of the net loss (lost - gained) / n of paired outcomes.

    It is the largest difference that a score test does not reject (Tango 1998), between -1 and 1, and increases with
    ``lost``. It is approximate, but accurate for few images and small losses, where Wald's interval is much too narrow:
    a candidate whose true net loss equals the tolerance passes a 90 % bound with a probability of 0.05 to 0.14
    (computed exactly in the tests).

    Args:
        lost: images whose outcome is right before and wrong after.
        gained: images whose outcome is wrong before and right after.
        num_images: n, at least 1, with the images whose outcome stays.
        confidence: in (0, 1); the true net loss exceeds the bound with a probability of about 1 minus this.

    Returns:
        The bound, a fraction of the images.
    """
    from scipy import stats  # slow to import, and only phase 2 needs it
    from scipy.optimize import brentq

    z, n = stats.norm.ppf(confidence), num_images

    def excess(difference: float) -> float:
        """Return by how much the observed loss plus z standard errors under ``difference`` exceeds n ``difference``."""
        b = -lost - gained + (2 * n - lost + gained) * difference
        c = -gained * difference * (1 - difference)
        gained_rate = (np.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * gained_rate + difference * (1 - difference))
        return float(lost - gained - n * difference + z * np.sqrt(max(variance, 0.0)))

    above = (lost - gained) / n + 1e-9  # at the observed loss itself the standard error may be 0
    if above >= 1 or excess(1.0) >= 0:
        return 1.0
    return float(brentq(excess, above, 1.0)) if excess(above) > 0 else above


def images_needed(tolerance: float, confidence: float) -> int:
    """Return the images with which a change that does no harm passes `paired_upper_bound` as often as ``confidence``.

    That is where the bound of a change with equal losses and gains, each `CHANGING` of the images, is half the
    tolerance: 227 at a tolerance of 0.05 and 90 % confidence, 66 at 0.1; at most `MAX_GUARD_IMAGES`, as for a tolerance
    of 0.
    """
    low, high = 2, MAX_GUARD_IMAGES
    while low < high:  # the bound falls with the number of images
        middle = (low + high) // 2
        changing = CHANGING * middle
        if paired_upper_bound(changing, changing, middle, confidence) <= tolerance / 2:
            high = middle
        else:
            low = middle + 1
    return low

"""From Shapley values to a selection of layers, and the guard's statistics.

``phi[l, 0]`` is layer l's share of the benign gain, ``phi[l, 1]`` its share of the robust *loss*: positive means that refining
this layer costs robustness. A layer is worth refining at price lambda if ``phi[l, 0] - lambda phi[l, 1] > 0``.
"""

from __future__ import annotations

import numpy as np
from scipy import stats


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


def paired_upper_bound(lost: int, gained: int, num_images: int, confidence: float) -> float:
    """One-sided upper confidence bound of the net loss (lost - gained) / n of paired outcomes.

    Agresti and Min (2005): Wald's interval for a difference of paired proportions after adding half an observation to each of
    the four cells. Between -1 and 1; it rises with ``lost``.

    It is approximate, and errs towards optimism where little is gained. A candidate whose true net loss equals a tolerance of
    0.05 should pass a 90 % bound with probability 0.10; where nothing is gained it passes with 0.19 (60 images) or 0.12 (200),
    where 5 % are gained with 0.11 (both). At a tolerance of 0.1 and 40 images it is 0.22. The tests sum this exactly.
    """
    n = num_images + 2.0
    b, c = lost + 0.5, gained + 0.5
    difference = (b - c) / n
    variance = max(b + c - (b - c) ** 2 / n, 0.0) / n**2
    return float(min(1.0, difference + stats.norm.ppf(confidence) * np.sqrt(variance)))

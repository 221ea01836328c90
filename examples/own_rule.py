"""A robust aggregation rule of one's own: the mean of those uploads that are not much longer than the median.

sylva-ray run digits --import . algorithm.name=fedavg_at_ft algorithm.robust.rule=examples.own_rule:drop_long
"""

from __future__ import annotations

import numpy as np


def drop_long(gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Return the coefficients [n] of the uploads.

    Args:
        gram: ``[n, n]``, the inner products of the clients' updates; their squared lengths are on its diagonal.
        num_byzantine: how many of the n may be malicious.
    """
    length = np.sqrt(np.diag(gram))
    kept = length <= 2 * np.median(length)
    kept[np.argsort(length, kind="stable")[len(length) - num_byzantine :]] = False
    return np.asarray(kept / max(1, kept.sum()))

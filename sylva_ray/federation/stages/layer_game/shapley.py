"""Shapley values, exact and by permutation sampling.

The Shapley value of player l is its mean marginal contribution over all orders in which players can arrive (Shapley
1953). A value function may be vector-valued: all arrays here may have trailing axes. By linearity one enumeration gives
the values of every combination of the components.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import numpy as np

MAX_EXACT_PLAYERS = 13
"""Largest number of players with which all 2^n coalitions are evaluated (12 blocks of ViT-B and the head)."""

MAX_ALWAYS_EXACT_PLAYERS = 8
"""Number of players up to which sampling saves nothing: 256 coalitions are as many as 16 antithetic pairs need."""

MIN_PAIRS = 4
"""Smallest number of antithetic pairs that are sampled."""


def all_coalitions(n: int) -> np.ndarray:
    """Return ``[2^n, n] bool``; row s contains player l if bit l of s is set."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def exact_shapley(values: np.ndarray) -> np.ndarray:
    """Return the Shapley values ``[n, ...]`` from ``values [2^n, ...]`` in the order of `all_coalitions`.

    phi_l = sum over S without l of |S|! (n - |S| - 1)! / n! (v(S + l) - v(S)).

    >>> exact_shapley(np.array([0.0, 0, 0, 1, 0, 1, 0, 1])).round(3).tolist()  # a left glove and two right ones
    [0.667, 0.167, 0.167]
    """
    n = _num_players(values)
    sizes = all_coalitions(n).sum(1)
    weight_of_size = np.array([factorial(s) * factorial(n - s - 1) / factorial(n) for s in range(n)])
    return _mean_marginals(values, weight_of_size, sizes)


def antithetic_permutations(n: int, num_pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``[2 num_pairs, n]`` random orders, each followed by its reverse (Mitchell et al. 2022).

    If players interact at most in pairs, one pair of orders gives the exact values.
    """
    forward = np.stack([rng.permutation(n) for _ in range(num_pairs)])
    return np.stack([forward, forward[:, ::-1]], axis=1).reshape(-1, n)


def prefix_coalitions(permutations: np.ndarray) -> np.ndarray:
    """Return the distinct coalitions that permutation sampling needs, ``[m, n] bool``, the empty one first."""
    return np.unique(_prefixes(permutations).reshape(-1, permutations.shape[1]), axis=0)


@dataclass(frozen=True)
class ShapleyEstimate:
    """An estimate of Shapley values.

    Attributes:
        value: ``[n, ...]``.
        half_width: of the confidence intervals, ``[n, ...]``.
    """

    value: np.ndarray
    half_width: np.ndarray


def permutation_shapley(
    permutations: np.ndarray, coalitions: np.ndarray, values: np.ndarray, confidence: float = 0.95
) -> ShapleyEstimate:
    """Average marginals over antithetic pairs (Castro et al. 2009), with Student intervals.

    Args:
        permutations: ``[2p, n]`` from `antithetic_permutations`, p >= 2.
        coalitions: ``[m, n]`` from `prefix_coalitions`, in any order.
        values: ``[m, ...]``, one row per coalition.
        confidence: of the intervals, in (0, 1).
    """
    from scipy import stats  # slow to import, and only phase 2 needs it

    assert len(permutations) >= 4, "an interval needs at least two antithetic pairs"
    values = np.asarray(values, np.float64)
    rows = {coalition.tobytes(): index for index, coalition in enumerate(coalitions)}
    marginals = np.zeros((len(permutations), permutations.shape[1], *values.shape[1:]))
    for index, (order, prefixes) in enumerate(zip(permutations, _prefixes(permutations), strict=True)):
        path = values[[rows[prefix.tobytes()] for prefix in prefixes]]
        marginals[index, order] = np.diff(path, axis=0)
    pairs = marginals.reshape(-1, 2, *marginals.shape[1:]).mean(1)
    error = pairs.std(0, ddof=1) / np.sqrt(len(pairs))
    return ShapleyEstimate(pairs.mean(0), stats.t.ppf((1 + confidence) / 2, len(pairs) - 1) * error)


def _prefixes(permutations: np.ndarray) -> np.ndarray:
    """Return ``[p, n + 1, n] bool``: the coalition after 0, 1, ..., n arrivals."""
    arrival = np.argsort(permutations, axis=1)
    return np.stack([arrival < size for size in range(permutations.shape[1] + 1)], axis=1)


def _mean_marginals(values: np.ndarray, weight_of_size: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    n = len(weight_of_size)
    index = np.arange(len(values))
    values = np.asarray(values, np.float64)  # differences of unsigned counts would wrap around
    result = np.zeros((n, *values.shape[1:]))
    for player in range(n):
        without = index[(index >> player & 1) == 0]
        gain = values[without | 1 << player] - values[without]
        result[player] = np.tensordot(weight_of_size[sizes[without]], gain, axes=1)
    return result


def _num_players(values: np.ndarray) -> int:
    n = len(values).bit_length() - 1
    assert len(values) == 2**n, "exact values need all 2^n coalitions"
    return n

"""Aggregating when some of the clients lie.

Krum, the geometric median and the clipping rules all return a *linear combination* of their inputs, and its coefficients depend
on nothing but the Gram matrix ``G[j, k] = <x_j, x_k>`` of the updates x_j. So they are computed here from G alone: the cost is
O(n^2) however large the model, and with G taken between products B A (`neighbours.product_gram`) the rules act on models, not on
one of the many pairs of factors that express them. Only the coordinate-wise rules need coordinates.

Updates are relative to the last aggregate, which is the origin. They are assumed finite: `factors.valid_uploads` comes first. The
rules ignore how many images a client claims to have, since that is one more thing to lie about. Squared distances come from G
and so carry a rounding of 1e-16 times the squared norms of the *two* inputs concerned, whatever the others send.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

CLIPPING_ITERATIONS = 3
"""Steps of centred clipping (Karimireddy et al. 2021)."""

WEISZFELD_ITERATIONS = 1000
"""A bound: tens are usual, hundreds happen if an input is all but the median. One costs n^2."""

STATIONARY = 1e-6
"""The geometric median is found when the mean of the unit vectors to the inputs is shorter than this."""

COINCIDENT = 1e-6
"""Two points closer than this share of the median distance are one point."""


def combination(rule: str, gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Coefficients ``c [n]`` of the aggregate ``sum_j c_j x_j``.

    Args:
        rule: one of `COMBINATION_RULES`.
        gram: ``[n, n]`` inner products of the updates; with fewer than `min_clients` of them the rule is undefined.
        num_byzantine: how many of the n may lie.

    The coefficients sum to 1, except under the two clipping rules: what is clipped away is left with the last aggregate.
    """
    g = _checked(gram)
    least, condition = min_clients(rule, num_byzantine)
    assert rule in _RULES, f"{rule} is not a combination of its inputs"
    assert len(g) >= least, f"{rule} needs {condition}: n = {len(g)}, f = {num_byzantine}"
    return _RULES[rule](g, num_byzantine)


def min_clients(rule: str, num_byzantine: int) -> tuple[int, str]:
    """The smallest n with which ``rule`` bears f = ``num_byzantine`` liars, and that condition in words.

    Krum's and the medians' are theorems. For the clipping rules the proofs ask for f/n below 0.1 or so, experiments reach 0.3,
    which is taken here; beyond one half the clipping radius itself is the attackers' to choose. The mean bears nobody.
    """
    if rule == "mean":
        return 1, "n >= 1"
    if rule in ("krum", "multi_krum"):
        return 2 * num_byzantine + 3, "n >= 2f + 3"
    if rule in ("geometric_median", "coordinate_median", "trimmed_mean"):
        return 2 * num_byzantine + 1, "n >= 2f + 1"
    assert rule in ("norm_clipping", "centred_clipping", "self_centred_clipping"), f"no such rule: {rule}"
    return max(1, -(-10 * num_byzantine // 3)), "f <= 0.3 n"


def assumed_byzantine(fraction: float, n: int) -> int:
    """f, the liars that a rule reckons with among n: rounded up (decimal fractions count as written: 0.2 of 5 is 1)."""
    return math.ceil(fraction * n - 1e-9)


def self_centred(gram: np.ndarray, weights: np.ndarray, own: int) -> np.ndarray:
    """Coefficients ``[n]`` of ``z_i = sum_j w_j (x_i + clip_tau(x_j - x_i))`` (self-centred clipping, He et al. 2022).

    Args:
        gram: ``[n, n]`` of one client and its neighbours.
        weights: ``[n]``, sum 1; a neighbour j moves the client by at most ``w_j tau``.
        own: the client's place among them. It trusts itself: the only rule here whose result differs from client to client.

    The paper's tau needs to know who is honest. Ours is the median distance to the others that have a weight, the *lower* one of
    two: then tau is at most the distance to some honest neighbour as long as no more than half of the others lie. With one
    neighbour nothing is clipped.
    """
    g, w = _checked(gram), np.asarray(weights, np.float64)
    assert abs(w.sum() - 1) < 1e-9, "weights must sum to 1"
    distance = np.sqrt(_squared_distances(g)[own])
    others = (w > 0) & (np.arange(len(w)) != own)
    coefficients = np.zeros(len(w))
    if others.any():
        tau = np.quantile(distance[others], 0.5, method="lower")
        coefficients[others] = w[others] * _clip(distance[others], tau)
    coefficients[own] = 1 - coefficients.sum()
    return coefficients


def coordinate_median(values: np.ndarray) -> np.ndarray:
    """Median over axis 0 of ``[n, ...]``, in float64; of an even n the mean of the two middles (Yin et al. 2018)."""
    return np.median(np.asarray(values, np.float64), axis=0)


def trimmed_mean(values: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Mean over axis 0 of ``[n, ...]``, in float64, without each coordinate's f largest and f smallest (Yin et al. 2018)."""
    n = len(values)
    assert n > 2 * num_byzantine, f"trimmed_mean needs n >= 2f + 1: n = {n}, f = {num_byzantine}"
    return np.sort(np.asarray(values, np.float64), axis=0)[num_byzantine : n - num_byzantine].mean(0)


def buckets(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """``M [ceil(n / size), n]``: every row averages a random group of ``size`` inputs (the last may be smaller).

    Bucketing (Karimireddy, He and Jaggi 2022) makes honest inputs alike before a rule sees them: ``M G M^T`` is the buckets' Gram
    matrix, and their coefficients c are ``c @ M`` of the inputs. f liars spoil up to f of the buckets: what `min_clients`
    asks for is to be met by the buckets.
    """
    matrix = np.zeros((-(-n // size), n))
    matrix[np.arange(n) // size, rng.permutation(n)] = 1
    return matrix / matrix.sum(1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# The rules: Gram matrix [n, n] and f -> coefficients [n].


def _mean(gram: np.ndarray, num_byzantine: int) -> np.ndarray:  # noqa: ARG001
    return np.full(len(gram), 1 / len(gram))


def _krum_order(gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Inputs from best to worst (ties: the lower number first): score = sum of *squared* distances to the n - f - 2 nearest."""
    squared = _squared_distances(gram)
    np.fill_diagonal(squared, np.inf)
    return np.sort(squared, axis=1)[:, : len(gram) - num_byzantine - 2].sum(1).argsort(kind="stable")


def _krum(gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """The input with the best score (Blanchard et al. 2017)."""
    return np.eye(len(gram))[_krum_order(gram, num_byzantine)[0]]


def _multi_krum(gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Mean of the n - f inputs with the best scores."""
    chosen = _krum_order(gram, num_byzantine)[: len(gram) - num_byzantine]
    return np.eye(len(gram))[chosen].mean(0)


def _geometric_median(gram: np.ndarray, num_byzantine: int) -> np.ndarray:  # noqa: ARG001
    """``argmin_z sum_j ||x_j - z||`` (RFA, Pillutla et al. 2022) by Weiszfeld's iteration.

    It starts at the medoid (the mean of them, if several tie). A geometric median that is itself an input is the medoid, hence
    found at once; from any other start the iteration would creep there. Weiszfeld's map is undefined at an input; Vardi and Zhang
    (2000) complete it: with eta inputs at z and R the sum of unit vectors to all the others, z is optimal if ``||R|| <= eta``
    and otherwise goes the share ``1 - eta / ||R||`` of the way. The objective only falls, so no other input is ever met.
    """
    total = np.sqrt(_squared_distances(gram)).sum(1)
    medoids = total <= total.min() * (1 + 1e-12)
    medoid = int(total.argmin())
    # Relative to the medoid: an input of size s far away has a coefficient of 1/s, and G's entries enter at most as s^2.
    g = gram - gram[medoid] - gram[:, medoid, None] + gram[medoid, medoid]
    c = medoids / medoids.sum()
    near = COINCIDENT * np.median(_distances_to(c, g))
    for _ in range(WEISZFELD_ITERATIONS):
        distance = _distances_to(c, g)
        here = distance <= near
        beta = np.divide(1, distance, out=np.zeros_like(distance), where=~here)
        residual = beta - beta.sum() * c
        pull = np.sqrt(max(residual @ g @ residual, 0))
        if pull <= here.sum() + STATIONARY * len(g):
            break
        stay = here.sum() / pull
        c = stay * c + (1 - stay) * beta / beta.sum()
    return c


def _norm_clipping(gram: np.ndarray, num_byzantine: int) -> np.ndarray:  # noqa: ARG001
    """Mean of the updates, each scaled down to the median norm (Sun et al. 2019). Bounds what a liar adds, not its direction."""
    norm = np.sqrt(np.clip(np.diag(gram), 0, None))
    return _clip(norm, np.median(norm)) / len(gram)


def _centred_clipping(gram: np.ndarray, num_byzantine: int) -> np.ndarray:  # noqa: ARG001
    """v <- v + mean_j clip_tau(x_j - v), from v = the last aggregate (Karimireddy et al. 2021); tau = median ||x_j - v||, anew in
    every iteration. In all, v moves by at most the sum of the taus."""
    c = np.zeros(len(gram))
    for _ in range(CLIPPING_ITERATIONS):
        distance = _distances_to(c, gram)
        scale = _clip(distance, np.median(distance))
        c = c + (scale - scale.sum() * c) / len(gram)
    return c


_RULES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "mean": _mean,
    "krum": _krum,
    "multi_krum": _multi_krum,
    "geometric_median": _geometric_median,
    "norm_clipping": _norm_clipping,
    "centred_clipping": _centred_clipping,
}

COMBINATION_RULES = tuple(_RULES)
"""What `combination` knows."""

COORDINATE_RULES = ("coordinate_median", "trimmed_mean")
"""What needs the values themselves."""


def _checked(gram: np.ndarray) -> np.ndarray:
    g = np.asarray(gram, np.float64)
    assert np.isfinite(g).all(), "updates must be finite"
    return g


def _squared_distances(gram: np.ndarray) -> np.ndarray:
    """``[n, n]``; zero, not slightly negative, between equal inputs."""
    norms = np.diag(gram)
    return np.clip(norms[:, None] + norms - 2 * gram, 0, None)


def _distances_to(c: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """``||x_j - sum_k c_k x_k||``, ``[n]``."""
    toward = gram @ c
    return np.sqrt(np.clip(np.diag(gram) - 2 * toward + c @ toward, 0, None))


def _clip(length: np.ndarray, radius: float) -> np.ndarray:
    """Factors in [0, 1] that bring the lengths down to the radius."""
    return np.divide(radius, length, out=np.ones_like(length), where=length > radius)

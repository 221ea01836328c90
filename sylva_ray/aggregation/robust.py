"""Robust aggregation rules, which tolerate Byzantine clients, as functions of a Gram matrix.

Krum, the geometric median and the clipping rules all return a *linear combination* of their inputs, and its
coefficients depend on the Gram matrix ``G[j, k] = <x_j, x_k>`` of the updates x_j only. They are computed here from G,
at a cost of O(n^2) for any model size. With G taken between products B A (`neighbours.product_gram`) the rules act on
models, not on one of the many pairs of factors that express a model. Only the coordinate-wise rules need coordinates.

Updates are relative to the last aggregate, which is the origin. They must be finite, which
`sylva_ray.transport.validation` ensures. The rules ignore the number of images that a client reports, because a
malicious client may report any number. Squared distances are computed from G, with a rounding error of 1e-16 times the
squared norms of the *two* inputs concerned, whatever the others send.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from sylva_ray.core.errors import UserError
from sylva_ray.core.own_code import load_attribute

CLIPPING_ITERATIONS = 3
"""Iterations of centred clipping (Karimireddy et al. 2021)."""

MAX_WEISZFELD_ITERATIONS = 1000
"""Tens are usual; hundreds occur if an input is very close to the median. One costs O(n^2)."""

STATIONARY = 1e-6
"""The geometric median is found when the mean of the unit vectors to the inputs is shorter than this."""

COINCIDENT = 1e-6
"""Two points closer than this fraction of the median distance are one point."""


def combination(rule: str, gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Return the coefficients ``c [n]`` of the aggregate ``sum_j c_j x_j``.

    Args:
        rule: one of `COMBINATION_RULES`, or ``package.module:function``.
        gram: ``[n, n]`` inner products of the updates; with fewer than `min_clients` of them the rule is undefined.
        num_byzantine: how many of the n inputs may be malicious.

    Returns:
        The coefficients. They sum to 1, except for the two clipping rules, where the rest is the weight of the last
        aggregate.

    Raises:
        UserError: an own rule cannot be imported, or returns something else.
    """
    g = _checked(gram)
    least, condition = min_clients(rule, num_byzantine)
    assert rule in _RULES or ":" in rule, f"{rule} is not a combination of its inputs"
    assert len(g) >= least, f"{rule} needs {condition}: n = {len(g)}, f = {num_byzantine}"
    return _RULES[rule](g, num_byzantine) if rule in _RULES else _own_rule(rule, g, num_byzantine)


def check_rule(rule: str) -> None:
    """Check that a rule of the user's own can be imported, and returns coefficients.

    Raises:
        UserError: it does not.
    """
    if ":" in rule:
        combination(rule, np.diag([1.0, 1.0, 4.0]), num_byzantine=1)


def min_clients(rule: str, num_byzantine: int) -> tuple[int, str]:
    """Return the smallest n for which ``rule`` tolerates f = ``num_byzantine`` malicious inputs, and the condition.

    The conditions of Krum and the medians are theorems. For the clipping rules the proofs need f/n below about 0.1,
    experiments reach 0.3, which is used here; with more than one half the attackers control the clipping radius. The
    mean tolerates none. A rule of the user's own is taken to tolerate any minority.
    """
    if rule == "mean":
        return 1, "n >= 1"
    if rule in ("krum", "multi_krum"):
        return 2 * num_byzantine + 3, "n >= 2f + 3"
    if rule in ("geometric_median", "coordinate_median", "trimmed_mean") or ":" in rule:
        return 2 * num_byzantine + 1, "n >= 2f + 1"
    assert rule in ("norm_clipping", "centred_clipping", "self_centred_clipping"), f"there is no rule {rule}"
    return max(1, -(-10 * num_byzantine // 3)), "f <= 0.3 n"


def assumed_byzantine(fraction: float, n: int) -> int:
    """Return f, the number of malicious inputs that a rule assumes among n, rounded up.

    A decimal fraction counts as it is written: 0.2 of 5 is 1.
    """
    return math.ceil(fraction * n - 1e-9)


def self_centred(gram: np.ndarray, weights: np.ndarray, own: int) -> np.ndarray:
    """Return the coefficients ``[n]`` of ``z_i = sum_j w_j (x_i + clip_tau(x_j - x_i))`` (He et al. 2022).

    This is self-centred clipping. The paper's tau depends on which clients are honest. Here it is the median distance
    to the other clients with a positive weight, the *lower* one of two. Then tau is at most the distance to some honest
    neighbour as long as no more than half of the others are malicious. With one neighbour nothing is clipped.

    Args:
        gram: ``[n, n]`` of one client and its neighbours.
        weights: ``[n]``, sum 1; a neighbour j moves the client by at most ``w_j tau``.
        own: the client's index among them. Its own update is the centre, so the result differs from client to client.
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
    """Return the median over axis 0 of ``[n, ...]`` in float64 (Yin et al. 2018)."""
    return np.median(np.asarray(values, np.float64), axis=0)


def trimmed_mean(values: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Return the mean over axis 0 of ``[n, ...]`` without the f largest and f smallest of each coordinate.

    Computed in float64 (Yin et al. 2018).
    """
    n = len(values)
    assert n > 2 * num_byzantine, f"trimmed_mean needs n >= 2f + 1: n = {n}, f = {num_byzantine}"
    return np.asarray(np.sort(np.asarray(values, np.float64), axis=0)[num_byzantine : n - num_byzantine].mean(0))


def buckets(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``M [ceil(n / size), n]``, whose rows average random groups of ``size`` inputs (the last may be smaller).

    Bucketing (Karimireddy, He and Jaggi 2022) makes honest inputs more similar before a rule is applied. ``M G M^T`` is
    the Gram matrix of the buckets, and coefficients c of the buckets are ``c @ M`` of the inputs. f malicious inputs
    affect up to f buckets, so the number of buckets must satisfy `min_clients`.
    """
    matrix = np.zeros((-(-n // size), n))
    matrix[np.arange(n) // size, rng.permutation(n)] = 1
    return np.asarray(matrix / matrix.sum(1, keepdims=True))


def _own_rule(name: str, gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Call ``package.module:function``, and check what it returns."""
    rule = load_attribute("algorithm.robust.rule", name)
    if not callable(rule):
        raise UserError("algorithm.robust.rule", name, "must be a function (gram, num_byzantine) -> coefficients")
    coefficients = np.asarray(rule(gram.copy(), num_byzantine), np.float64)
    if coefficients.shape != (len(gram),) or not np.isfinite(coefficients).all():
        fix = f"must return one finite coefficient per upload, [{len(gram)}], and returned {list(coefficients.shape)}"
        raise UserError("algorithm.robust.rule", name, fix)
    return coefficients


# ---------------------------------------------------------------------------------------------------------------------
# The rules: Gram matrix [n, n] and f -> coefficients [n].


def _mean(gram: np.ndarray, num_byzantine: int) -> np.ndarray:  # noqa: ARG001
    return np.full(len(gram), 1 / len(gram))


def _krum_order(gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Order the inputs from best to worst, ties by number.

    The score of an input is the sum of *squared* distances to its n - f - 2 nearest inputs.
    """
    squared = _squared_distances(gram)
    np.fill_diagonal(squared, np.inf)
    return np.asarray(np.sort(squared, axis=1)[:, : len(gram) - num_byzantine - 2].sum(1).argsort(kind="stable"))


def _krum(gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Take the input with the best score (Blanchard et al. 2017)."""
    return np.asarray(np.eye(len(gram))[_krum_order(gram, num_byzantine)[0]])


def _multi_krum(gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Average the n - f inputs with the best scores."""
    chosen = _krum_order(gram, num_byzantine)[: len(gram) - num_byzantine]
    return np.asarray(np.eye(len(gram))[chosen].mean(0))


def _geometric_median(gram: np.ndarray, num_byzantine: int) -> np.ndarray:  # noqa: ARG001
    """Minimise ``sum_j ||x_j - z||`` over z (RFA, Pillutla et al. 2022) by Weiszfeld's iteration.

    It starts at the medoid (the mean of the medoids, if several tie). A geometric median that is itself an input is the
    medoid, so it is the start; from any other start the iteration would converge slowly. Weiszfeld's map is undefined
    at an input. Vardi and Zhang (2000) complete it: with eta inputs at z and R the sum of unit vectors to all the
    others, z is optimal if ``||R|| <= eta``, and otherwise goes the fraction ``1 - eta / ||R||`` of the way. The
    objective never increases, so the iteration meets no other input.
    """
    total = np.sqrt(_squared_distances(gram)).sum(1)
    medoids = total <= total.min() * (1 + 1e-12)
    medoid = int(total.argmin())
    # Relative to the medoid: an input at distance s has a coefficient of 1/s, and entries of G enter at most as s^2.
    g = gram - gram[medoid] - gram[:, medoid, None] + gram[medoid, medoid]
    c = medoids / medoids.sum()
    near = COINCIDENT * np.median(_distances_to(c, g))
    for _ in range(MAX_WEISZFELD_ITERATIONS):
        distance = _distances_to(c, g)
        here = distance <= near
        beta = np.divide(1, distance, out=np.zeros_like(distance), where=~here)
        residual = beta - beta.sum() * c
        pull = np.sqrt(max(residual @ g @ residual, 0))
        if pull <= here.sum() + STATIONARY * len(g):
            break
        stay = here.sum() / pull
        c = stay * c + (1 - stay) * beta / beta.sum()
    return np.asarray(c)


def _norm_clipping(gram: np.ndarray, num_byzantine: int) -> np.ndarray:  # noqa: ARG001
    """Average the updates, each scaled down to the median norm (Sun et al. 2019).

    This bounds the length of a malicious update, not its direction.
    """
    norm = np.sqrt(np.clip(np.diag(gram), 0, None))
    return _clip(norm, np.median(norm)) / len(gram)


def _centred_clipping(gram: np.ndarray, num_byzantine: int) -> np.ndarray:  # noqa: ARG001
    """Iterate v <- v + mean_j clip_tau(x_j - v) from v = the last aggregate (Karimireddy et al. 2021).

    tau is the median of ||x_j - v||, computed in every iteration. In all, v moves by at most the sum of the taus.
    """
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
"""The rules of `combination`."""

COORDINATE_RULES = ("coordinate_median", "trimmed_mean")
"""The rules that need the values themselves."""


def _checked(gram: np.ndarray) -> np.ndarray:
    g = np.asarray(gram, np.float64)
    assert np.isfinite(g).all(), "updates must be finite"
    return g


def _squared_distances(gram: np.ndarray) -> np.ndarray:
    """Return ``[n, n]`` squared distances; zero, not slightly negative, between equal inputs."""
    norms = np.diag(gram)
    return np.asarray(np.clip(norms[:, None] + norms - 2 * gram, 0, None))


def _distances_to(c: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Return ``||x_j - sum_k c_k x_k||``, ``[n]``."""
    toward = gram @ c
    return np.asarray(np.sqrt(np.clip(np.diag(gram) - 2 * toward + c @ toward, 0, None)))


def _clip(length: np.ndarray, radius: float) -> np.ndarray:
    """Return factors in [0, 1] that bring lengths down to the radius."""
    return np.asarray(np.divide(radius, length, out=np.ones_like(length), where=length > radius))

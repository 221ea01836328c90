"""Exact averages of LoRA products, which change the frozen W or send more numbers; and the bytes that each rule needs.

``FLoRA`` (Wang et al. 2024) concatenates the factors, with the weight on one of the two only: ``[B_1, B_2] [w_1 A_1;
w_2 A_2]`` is ``sum w B A``. ``FedEx-LoRA`` (Singhal et al. 2024) averages the factors and adds the error, ``sum w B A -
mean B mean A``, to W. In both, clients with different scalings alpha / r multiply B by theirs first.

Factors are ``(B_k [d_out, r_k], A_k [r_k, d_in])``. Sums are computed in float64 in the given order; results have the
dtype of the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from sylva_ray.aggregation.factors import average

Factors: TypeAlias = tuple[np.ndarray, np.ndarray]
Weights: TypeAlias = Sequence[float] | np.ndarray

RULES = ("naive", "product_svd", "ffa", "fedsa", "flora", "fedex")


def flora_stack(factors: Sequence[Factors], weights: Weights) -> Factors:
    """Return ``B [d_out, sum r_k]`` and ``A [sum r_k, d_in]`` with ``B A = sum w_k B_k A_k``.

    Clients add the product to W and start from new factors.
    """
    _check(weights)
    b = np.concatenate([b for b, _ in factors], axis=1)
    a = np.concatenate([w * a.astype(np.float64) for w, (_, a) in zip(weights, factors, strict=True)], axis=0)
    return b, a.astype(b.dtype)


def fedex_residual(factors: Sequence[Factors], weights: Weights) -> np.ndarray:
    """Return ``sum w B A - (sum w B)(sum w A)``, ``[d_out, d_in]``, for factors of equal ranks.

    Times the scaling it is added to W. It is computed as ``sum w (B - mean B)(A - mean A)``, which avoids the
    cancellation.
    """
    mean_b, mean_a = _mean(factors, weights)
    residual = sum(w * (b - mean_b) @ (a - mean_a) for w, (b, a) in zip(weights, factors, strict=True))
    return np.asarray(residual).astype(factors[0][0].dtype)


def fedex_residual_factors(factors: Sequence[Factors], weights: Weights) -> Factors:
    """Return the residual of `fedex_residual` as ``B [d_out, (K - 1) r]`` and ``A [(K - 1) r, d_in]``.

    This is cheaper to send while ``(K - 1) r (d_in + d_out) < d_in d_out``. As ``sum w (B_k - mean B)`` is 0, ``A_k -
    mean A`` may be replaced by ``A_k - A_K``, and the last of the K terms vanishes.
    """
    mean_b, _ = _mean(factors, weights)
    last_a = factors[-1][1].astype(np.float64)
    dtype = factors[0][0].dtype
    b = [np.zeros((len(mean_b), 0)), *(w * (b - mean_b) for w, (b, _) in list(zip(weights, factors, strict=True))[:-1])]
    a = [last_a[:0], *(a - last_a for _, a in factors[:-1])]
    return np.concatenate(b, axis=1).astype(dtype), np.concatenate(a, axis=0).astype(dtype)


def upload_floats(rule: str, d_in: int, d_out: int, rank: int) -> int:
    """Return how many numbers a client of this rank sends for one module: both factors, or B (ffa), or A (fedsa)."""
    assert rule in RULES, f"there is no rule {rule}"
    return rank * {"ffa": d_out, "fedsa": d_in}.get(rule, d_in + d_out)


def download_floats(rule: str, d_in: int, d_out: int, ranks: Sequence[int], receiver: int = 0) -> int:
    """Return how many numbers client ``receiver`` gets for one module after clients of ``ranks`` have sent theirs.

    ``flora``: all factors. ``fedex``: the mean factors, and the residual as factors or dense, whichever is smaller.
    Other rules: as many as the client has sent.
    """
    num_uploaded = upload_floats(rule, d_in, d_out, ranks[receiver])
    if rule == "flora":
        return sum(ranks) * (d_in + d_out)
    if rule == "fedex":
        return num_uploaded + min((len(ranks) - 1) * num_uploaded, d_in * d_out)
    return num_uploaded


def _check(weights: Weights) -> None:
    assert np.isfinite(weights).all(), "weights must be finite"
    assert abs(np.sum(weights) - 1) < 1e-9, "weights must sum to 1"


def _mean(factors: Sequence[Factors], weights: Weights) -> Factors:
    """Return the means of B and of A in float64."""
    states = [{"b": b.astype(np.float64), "a": a.astype(np.float64)} for b, a in factors]
    mean = average(states[0], states, weights)
    return mean["b"], mean["a"]

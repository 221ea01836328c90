"""Rules that average LoRA products without an error, at the price of changing the frozen W or sending more; and their bytes.

``FLoRA`` (Wang et al. 2024) stacks the factors, with the weight on one of the two only: ``[B_1, B_2] [w_1 A_1; w_2 A_2]`` is
``sum w B A``. ``FedEx-LoRA`` (Singhal et al. 2024) averages them and adds the error, ``sum w B A - mean B mean A``, to W. In
both, clients of different scaling alpha / r fold it into B. ``HETLoRA`` (Cho et al. 2024) is not exact; it pads ranks that
differ with zeros.

Factors are ``(B_k [d_out, r_k], A_k [r_k, d_in])``. Sums run in float64 in the given order; results have the factors' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from sylva_ray.aggregation.factors import average

Factors: TypeAlias = tuple[np.ndarray, np.ndarray]
Weights: TypeAlias = Sequence[float] | np.ndarray

RULES = ("naive", "product_svd", "ffa", "fedsa", "flora", "fedex", "hetlora")


def flora_stack(factors: Sequence[Factors], weights: Weights) -> Factors:
    """``B [d_out, sum r_k]``, ``A [sum r_k, d_in]`` with ``B A = sum w_k B_k A_k``; clients merge it into W and start anew."""
    _check(weights)
    b = np.concatenate([b for b, _ in factors], axis=1)
    a = np.concatenate([w * a.astype(np.float64) for w, (_, a) in zip(weights, factors, strict=True)], axis=0)
    return b, a.astype(b.dtype)


def fedex_residual(factors: Sequence[Factors], weights: Weights) -> np.ndarray:
    """``[d_out, d_in]``: ``sum w B A - (sum w B)(sum w A)``, which goes to W, times the scaling. Ranks are equal.

    Computed as ``sum w (B - mean B)(A - mean A)``, the same without the cancellation."""
    mean_b, mean_a = _mean(factors, weights)
    residual = sum(w * (b - mean_b) @ (a - mean_a) for w, (b, a) in zip(weights, factors, strict=True))
    return np.asarray(residual).astype(factors[0][0].dtype)


def fedex_residual_factors(factors: Sequence[Factors], weights: Weights) -> Factors:
    """The same as ``B [d_out, (K - 1) r]``, ``A [(K - 1) r, d_in]``, cheaper to send while ``(K - 1) r d < d_in d_out``.

    ``sum w (B_k - mean B)`` is 0, so ``A_k - mean A`` may become ``A_k - A_K``, and the last of the K terms vanishes."""
    mean_b, _ = _mean(factors, weights)
    last_a = factors[-1][1].astype(np.float64)
    dtype = factors[0][0].dtype
    b = [np.zeros((len(mean_b), 0)), *(w * (b - mean_b) for w, (b, _) in list(zip(weights, factors, strict=True))[:-1])]
    a = [last_a[:0], *(a - last_a for _, a in factors[:-1])]
    return np.concatenate(b, axis=1).astype(dtype), np.concatenate(a, axis=0).astype(dtype)


def hetlora_merge(factors: Sequence[Factors], slots: str = "all") -> Factors:
    """``B [d_out, r_max]``, ``A [r_max, d_in]``: means of the zero-padded factors, weights proportional to ``|B_k A_k|_F``.

    Args:
        factors: one pair per client, of any ranks. If all products are 0, clients weigh the same.
        slots: ``all``: as published; the zeros of low ranks dilute the upper slots. ``owners``: slot j is divided by the
            weights of the clients with ``r_k > j`` (their plain mean where those are all 0).
    """
    assert slots in ("all", "owners"), f"slots are all or owners, not {slots}"
    ranks = np.array([len(a) for _, a in factors])
    owns = np.arange(ranks.max()) < ranks[:, None]  # [K, r_max]
    norms = np.array([product_norm(b, a) for b, a in factors])
    among = owns if slots == "owners" else np.ones_like(owns)
    weights = np.stack([_shares(norms, marked) for marked in among.T], axis=1)  # [K, r_max], columns sum to 1
    padded = [_pad(b.astype(np.float64), a.astype(np.float64), int(ranks.max())) for b, a in factors]
    anchor_b, anchor_a = padded[0]  # anchor + sum w (theta - anchor): equal clients are the identity bit for bit
    b = anchor_b + sum(w * (b - anchor_b) for w, (b, _) in zip(weights, padded, strict=True))
    a = anchor_a + sum(w[:, None] * (a - anchor_a) for w, (_, a) in zip(weights, padded, strict=True))
    return b.astype(factors[0][0].dtype), a.astype(factors[0][0].dtype)


def truncate(b: np.ndarray, a: np.ndarray, rank: int) -> Factors:
    """The first ``rank`` slots: what HETLoRA sends to a client of that rank (copies)."""
    assert 0 < rank <= len(a), f"rank {rank} of {len(a)}"
    return b[:, :rank].copy(), a[:rank].copy()


def product_norm(b: np.ndarray, a: np.ndarray) -> float:
    """``|B A|_F`` from the two triangular factors, in O(d r^2): orthonormal columns do not change a norm."""
    upper_b = np.asarray(np.linalg.qr(b.astype(np.float64), mode="r"))
    upper_a = np.asarray(np.linalg.qr(a.T.astype(np.float64), mode="r"))
    return float(np.linalg.norm(upper_b @ upper_a.T))


def upload_floats(rule: str, d_in: int, d_out: int, rank: int) -> int:
    """Numbers that a client of this rank sends for one module, by its rule: both factors, or B (ffa), or A (fedsa)."""
    assert rule in RULES, f"no such rule: {rule}"
    return rank * {"ffa": d_out, "fedsa": d_in}.get(rule, d_in + d_out)


def download_floats(rule: str, d_in: int, d_out: int, ranks: Sequence[int], receiver: int = 0) -> int:
    """Numbers that client ``receiver`` gets for one module, when clients of these ``ranks`` have sent theirs.

    ``flora``: all factors. ``fedex``: the mean factors, and the residual as factors or dense, whichever is smaller. Others: as
    much as the client has sent."""
    own = upload_floats(rule, d_in, d_out, ranks[receiver])
    if rule == "flora":
        return sum(ranks) * (d_in + d_out)
    if rule == "fedex":
        return own + min((len(ranks) - 1) * own, d_in * d_out)
    return own


def _check(weights: Weights) -> None:
    assert np.isfinite(weights).all(), "weights must be finite"
    assert abs(np.sum(weights) - 1) < 1e-9, "weights must sum to 1"


def _mean(factors: Sequence[Factors], weights: Weights) -> Factors:
    """The means of B and of A, float64."""
    states = [{"b": b.astype(np.float64), "a": a.astype(np.float64)} for b, a in factors]
    mean = average(states[0], states, weights)
    return mean["b"], mean["a"]


def _pad(b: np.ndarray, a: np.ndarray, rank: int) -> Factors:
    missing = (0, rank - len(a))
    return np.pad(b, ((0, 0), missing)), np.pad(a, (missing, (0, 0)))


def _shares(sizes: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Proportional to ``sizes`` (equal if all are 0) among the marked entries, 0 elsewhere; they sum to 1."""
    sizes = np.where(marked, sizes, 0.0)
    return sizes / sizes.sum() if sizes.sum() > 0 else marked / marked.sum()

"""Averaging client states, and the LoRA factors in them.

The mean of products is not the product of means: ``sum w B A - (sum w B)(sum w A) = sum w (B - mean B)(A - mean A)``. And
``(B R)(R^-1 A) = B A`` for every invertible R, so averages of factors are not even functions of the models. ``naive`` averages
the factors all the same (FedIT, Zhang et al. 2024) and is a labelled mode; ``product_svd`` averages the products and returns
the best rank-r factors of the result, without ever forming a dense matrix.

Every rule is written as anchor + sum w (theta - anchor), summed in the given order in float64, so identical clients are the
identity bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sylva_ray.types import ClientState

INITIAL_SCALE = np.sqrt(3.0)
"""A's rows start with norm 1/sqrt(3) (Kaiming-uniform, a = sqrt 5); re-factored ones keep that scale."""

RANK_TOLERANCE = 1e-7
"""Singular values below this share of the largest are zero directions (float32 factors carry about this much noise)."""


def average(
    anchor: ClientState, states: Sequence[ClientState], weights: Sequence[float] | np.ndarray
) -> dict[str, np.ndarray]:
    """anchor + sum_j w_j (theta_j - anchor) for every name of ``anchor``, in its dtype; the weights sum to 1."""
    mean_weights = _checked(weights)
    return {
        name: (
            value.astype(np.float64)
            + sum(w * (state[name].astype(np.float64) - value) for w, state in zip(mean_weights, states, strict=True))
        ).astype(value.dtype)
        for name, value in anchor.items()
    }


def merge_factors(
    anchor: ClientState, states: Sequence[ClientState], weights: Sequence[float] | np.ndarray, rule: str
) -> dict[str, np.ndarray]:
    """Merge ``states`` for the client that holds ``anchor``.

    Args:
        anchor: the receiving client's own upload.
        states: the uploads to merge, in client order. Where ``X.lora_A [r, d_in]`` and ``X.lora_B [d_out, r]`` come in pairs
            the rule applies; a factor without its partner (the other one is the same for all, or personal) is averaged.
        weights: one per state, summing to 1.
        rule: ``naive`` or ``product_svd``. What is not a pair of LoRA factors is averaged under either.
    """
    w = _checked(weights)
    if rule == "naive" or all(_same(anchor, state) for state in states):
        return average(anchor, states, w)
    assert rule == "product_svd", f"no such rule: {rule}"
    modules = paired_modules(anchor)
    paired = {f"{module}.lora_{factor}" for module in modules for factor in "AB"}
    merged = average({name: value for name, value in anchor.items() if name not in paired}, states, w)
    for module in modules:
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        merged[b], merged[a] = merge_products(anchor[a], [(state[b], state[a]) for state in states], w)
    return merged


def paired_modules(state: ClientState) -> list[str]:
    """Modules of which ``state`` holds both LoRA factors, in its order."""
    modules = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    return [module for module in modules if f"{module}.lora_B" in state]


def merge_products(
    anchor_a: np.ndarray, factors: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Best rank-r ``B, A`` of ``sum_j w_j B_j A_j`` (Eckart-Young), by QR of the stacked factors and an SVD of the core.

    Args:
        anchor_a: ``[r, d_in]``; its rows stay where the merged product has no direction left (B is 0 there), so that a
            client can still learn: with both factors 0 no gradient would ever reach them.
        factors: ``(B_j [d_out, r_j], A_j [r_j, d_in])``; ranks may differ.
        weights: one per factor pair.

    Returns:
        ``B [d_out, r]``, ``A [r, d_in]`` in the anchor's dtype. The approximation error is the tail of the singular values.
    """
    rank = len(anchor_a)
    left = np.concatenate([w * b.astype(np.float64) for w, (b, _) in zip(weights, factors, strict=True)], axis=1)
    right = np.concatenate([a.astype(np.float64) for _, a in factors], axis=0)
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    u, vt = q_left @ u[:, : len(s)], vt[: len(s)] @ q_right.T
    b = np.zeros((len(left), rank))
    a = anchor_a.astype(np.float64)
    for j in range(min(rank, len(s))):
        if s[j] <= RANK_TOLERANCE * s[0]:
            break
        sign = np.sign(u[np.abs(u[:, j]).argmax(), j])  # an SVD is free in sign; ours is not
        b[:, j] = INITIAL_SCALE * s[j] * sign * u[:, j]
        a[j] = sign * vt[j] / INITIAL_SCALE
    return b.astype(anchor_a.dtype), a.astype(anchor_a.dtype)


def orthonormal_rows(a: np.ndarray) -> np.ndarray:
    """An ``A [r, d_in]`` whose rows span the same space, orthogonal, of norm 1/sqrt(3): then B alone is isometric to B A.

    ``||(B - B') A||_F = ||B - B'||_F / sqrt(3)``, so averages, distances and medians of B are those of the models."""
    q, upper = np.linalg.qr(a.astype(np.float64).T)
    return ((q * np.sign(np.diag(upper))).T / INITIAL_SCALE).astype(a.dtype)


def drop_bad(states: Sequence[ClientState]) -> list[int]:
    """Indices of the uploads that are finite and have the names and shapes of most of the others."""
    shapes = [tuple(sorted((name, value.shape) for name, value in state.items())) for state in states]
    usual = max(shapes, key=shapes.count, default=())
    return [
        index
        for index, state in enumerate(states)
        if shapes[index] == usual and all(np.isfinite(value).all() for value in state.values())
    ]


def _checked(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    w = np.asarray(weights, np.float64)
    assert np.isfinite(w).all(), "weights must be finite"
    assert abs(w.sum() - 1) < 1e-9, "weights must sum to 1"
    return w


def _same(a: ClientState, b: ClientState) -> bool:
    return all(np.array_equal(value, b[name]) for name, value in a.items())

"""Averages of client states and of the LoRA factors in them.

The mean of products is not the product of means: ``sum w B A - (sum w B)(sum w A) = sum w (B - mean B)(A - mean A)``.
And ``(B R)(R^-1 A) = B A`` for every invertible R, so an average of factors is not a function of the models. The rule
``naive`` averages the factors nevertheless (FedIT, Zhang et al. 2024). The rule ``product_svd`` averages the products
and returns the best rank-r factors of the result.

Every rule computes anchor + sum w (theta - anchor), summed in the given order in float64, so the merge of identical
clients returns them bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sylva_ray.aggregation.low_rank import leading_triplets
from sylva_ray.core.types import ClientState

INITIAL_SCALE = np.sqrt(3.0)
"""The rows of A start with norm 1/sqrt(3) (Kaiming-uniform, a = sqrt 5); refactored rows keep that scale."""

RANK_TOLERANCE = 1e-7
"""Singular values below this fraction of the largest count as zero: float32 factors have about this much noise."""

STACK_SIZE = 2**19
"""Numbers in the factors of all states that are merged at once.

Small modules are merged together, which is faster; large ones one by one, which needs less memory."""


def average(
    anchor: ClientState, states: Sequence[ClientState], weights: Sequence[float] | np.ndarray
) -> dict[str, np.ndarray]:
    """Return anchor + sum_j w_j (theta_j - anchor) for every name of ``anchor``, in its dtype; the weights sum to 1."""
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
    """Merge ``states`` for one client.

    Args:
        anchor: the upload of that client.
        states: the uploads to merge, in the order of the clients. The rule applies to pairs ``X.lora_A [r, d_in]`` and
            ``X.lora_B [d_out, r]``. A factor alone (the other one is the same for all clients, or personal) is
            averaged.
        weights: one per state; they sum to 1.
        rule: ``naive`` or ``product_svd``. What is not a pair of LoRA factors is averaged under both.
    """
    w = _checked(weights)
    if rule == "naive" or all(_same(anchor, state) for state in states):
        return average(anchor, states, w)
    assert rule == "product_svd", f"there is no rule {rule}"
    modules = paired_modules(anchor)
    paired = {f"{module}.lora_{factor}" for module in modules for factor in "AB"}
    merged = average({name: value for name, value in anchor.items() if name not in paired}, states, w)
    weighted = [state for state, weight in zip(states, w, strict=True) if weight]
    for group in _of_equal_shapes(anchor, modules, len(weighted)):
        anchor_a = np.stack([anchor[f"{module}.lora_A"] for module in group])
        b, a = refactored(anchor_a, *_concatenated(weighted, w[w != 0], group))
        for index, module in enumerate(group):
            merged[f"{module}.lora_B"], merged[f"{module}.lora_A"] = b[index], a[index]
    return merged


def paired_modules(state: ClientState) -> list[str]:
    """Return the modules of which ``state`` has both LoRA factors, in its order."""
    modules = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    return [module for module in modules if f"{module}.lora_B" in state]


def aligned_pair(
    a: np.ndarray, b: np.ndarray, reference_a: np.ndarray, reference_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return factors of the same product B A that are as near as possible to those of another product.

    They are Q A and B Q^T with the orthogonal Q of the least squares (orthogonal Procrustes problem, Schönemann 1966).

    Args:
        a: ``[r, d_in]``.
        b: ``[d_out, r]``.
        reference_a: as ``a``.
        reference_b: as ``b``.
    """
    overlap = reference_a.astype(np.float64) @ a.T + reference_b.astype(np.float64).T @ b
    if not np.isfinite(overlap).all():
        return a, b
    u, _, vt = np.linalg.svd(overlap)
    turn = u @ vt
    return (turn @ a).astype(a.dtype), (b @ turn.T).astype(b.dtype)


def orthonormal_rows(a: np.ndarray) -> np.ndarray:
    """Return orthogonal rows of norm 1/sqrt(3) that span the same space as those of ``a [r, d_in]``.

    With such an A, ``||(B - B') A||_F = ||B - B'||_F / sqrt(3)``: averages, distances and medians of B are those of the
    models.
    """
    q, upper = np.linalg.qr(a.astype(np.float64).T)
    return np.asarray(((q * np.sign(np.diag(upper))).T / INITIAL_SCALE).astype(a.dtype))


def _of_equal_shapes(anchor: ClientState, modules: Sequence[str], num_states: int) -> list[list[str]]:
    """Group ``modules`` whose factors have the same shapes, up to `STACK_SIZE` numbers per group."""
    groups: dict[tuple[int, int, int], list[str]] = {}
    for module in modules:
        (rank, d_in), d_out = anchor[f"{module}.lora_A"].shape, len(anchor[f"{module}.lora_B"])
        groups.setdefault((rank, d_in, d_out), []).append(module)
    stacks = []
    for (rank, d_in, d_out), group in groups.items():
        step = max(1, STACK_SIZE // (num_states * rank * (d_in + d_out)))
        stacks += [group[i : i + step] for i in range(0, len(group), step)]
    return stacks


def _concatenated(
    states: Sequence[ClientState], weights: np.ndarray, modules: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``left [m, d_out, n]`` and ``right [m, n, d_in]``, n = K r, whose product is the mean of the products."""
    rank, d_in = states[0][f"{modules[0]}.lora_A"].shape
    d_out, num_columns = len(states[0][f"{modules[0]}.lora_B"]), len(states) * rank
    left = np.empty((len(modules), d_out, num_columns), states[0][f"{modules[0]}.lora_B"].dtype)
    right = np.empty((len(modules), num_columns, d_in))
    for index, module in enumerate(modules):
        np.concatenate([state[f"{module}.lora_B"] for state in states], axis=1, out=left[index])
        np.concatenate([state[f"{module}.lora_A"] for state in states], axis=0, out=right[index])
    right *= np.repeat(weights, rank)[:, None]
    return left, right


def refactored(anchor_a: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the best rank-r ``B, A`` of the product ``left @ right`` (Eckart-Young).

    Args:
        anchor_a: ``[..., r, d_in]``. Its rows are kept where the rank of the product is lower than r. B is 0 there, and
            with both factors 0 no gradient would reach them.
        left: ``[..., d_out, n]``, the clients' B, concatenated.
        right: ``[..., n, d_in]``, their A times their weights, concatenated.

    Returns:
        ``B [..., d_out, r]``, ``A [..., r, d_in]`` in the dtype of the anchor. The approximation error is made of the
        singular values after the r largest.
    """
    return factors_of_triplets(anchor_a, *leading_triplets(left, right, anchor_a.shape[-2]))


def factors_of_triplets(
    anchor_a: np.ndarray, u: np.ndarray, s: np.ndarray, vt: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors ``B, A`` of the product ``u s vt``, as `refactored` describes them.

    Args:
        anchor_a: ``[..., r, d_in]``.
        u: ``[..., d_out, q]``, q at most r.
        s: ``[..., q]``, in descending order.
        vt: ``[..., q, d_in]``.
    """
    largest = np.take_along_axis(u, np.abs(u).argmax(-2, keepdims=True), -2)[..., 0, :]
    signs, rank = np.sign(largest), s.shape[-1]  # an SVD is unique up to signs only
    nonzero = s > RANK_TOLERANCE * s[..., :1]
    b, a = np.zeros((*u.shape[:-1], anchor_a.shape[-2])), anchor_a.astype(np.float64)
    b[..., :rank] = u * (INITIAL_SCALE * s * signs * nonzero)[..., None, :]
    a[..., :rank, :] = np.where(nonzero[..., None], vt * (signs / INITIAL_SCALE)[..., None], a[..., :rank, :])
    return b.astype(anchor_a.dtype), a.astype(anchor_a.dtype)


def _checked(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    w = np.asarray(weights, np.float64)
    assert np.isfinite(w).all(), "weights must be finite"
    assert abs(w.sum() - 1) < 1e-9, "weights must sum to 1"
    return w


def _same(a: ClientState, b: ClientState) -> bool:
    return all(np.array_equal(value, b[name]) for name, value in a.items())

"""The best rank-r approximation of a product of two long factors, ``M = left [d_out, n] @ right [n, d_in]``.

Long factors are multiplied with blocks of 2 r vectors in single precision, without forming M, until the residuals bound
the error by `SINGLE_ERROR` (subspace iteration, Halko, Martinsson and Tropp 2011). That costs O(n (d_out + d_in) r) and
a few passes where the spectrum falls after the r-th value, which is so where clients have moved from a common state.

Short factors, and products whose spectrum falls slowly, are computed in double precision from the smallest Gram matrix
that has the squared singular values of M: one of order n from the Gram matrices of the factors where n is small,
otherwise one of order min(d_out, d_in) from M. Squaring loses half the digits, so singular values below about 1e-7 of
the largest are lost. The others are not affected: M itself is projected on the directions, and the triplets are those
of the projection (Rayleigh-Ritz).

All functions work on stacks: ``...`` are leading axes, e.g. modules of equal shapes.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np

PRODUCT_ERROR = 1e-7
"""Largest error (Frobenius norm) against the best product, as a fraction of the largest singular value."""

SINGLE_ERROR = 1e-6
"""The same for products that are computed in single precision."""

MAX_SINGLE_PASSES = 4
"""Checked passes in single precision. With what they miss, the way by a Gram matrix is faster."""

MAX_DIRECT_ORDER = 32
"""Matrices up to this order are given to LAPACK: an iteration would not be faster."""

CANCELLATION = 0.1
"""Smallest ``n ||M||^2 / (||left||^2 ||right||^2)`` (Frobenius) for which the Gram matrices of the factors are used.

Below it so much cancels in the sum that their rounding errors would matter, and M is formed. Unrelated factors have 1,
factors with a common part more."""

EPS, TINY = np.finfo(np.float64).eps, np.finfo(np.float64).tiny

Triplets: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
"""``u [..., d_out, q]``, ``s [..., q]``, ``vt [..., q, d_in]``."""


def leading_triplets(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ``rank`` largest singular triplets of ``left [..., d_out, n] @ right [..., n, d_in]``.

    Returns:
        ``u [..., d_out, q]``, ``s [..., q]`` in descending order, ``vt [..., q, d_in]``, all float64, where q is
        ``rank`` or less. Their product is within `SINGLE_ERROR` of the best one if singular values r and r + 1 differ;
        if they are equal, the best one is not unique.
    """
    if min(left.shape[-2], right.shape[-1], left.shape[-1]) <= max(MAX_DIRECT_ORDER, 4 * rank):
        return _by_gram_matrices(left, right, rank)
    (u, s, vt), found = _by_iteration(left, right, rank)
    if not found.all():
        u[~found], s[~found], vt[~found] = _by_gram_matrices(left[~found], right[~found], rank)
    return u, s, vt


def _by_iteration(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[Triplets, np.ndarray]:
    """Compute the triplets by subspace iteration in single precision.

    A pass multiplies an orthonormal basis x by M^T, which gives Ritz triplets ``x u, s, v`` with ``M^T x u = v s``, and
    v by M, which gives the residuals of x u and a basis that is one multiplication ahead.

    Returns:
        The triplets, and whether they are as good as promised, ``[...] bool``.
    """
    sizes = [np.sqrt(np.einsum("...ij,...ij->...", factor, factor, dtype=np.float64)) for factor in (left, right)]
    b, a = (_unit(factor, size) for factor, size in zip((left, right), sizes, strict=True))
    x = b @ (a @ np.linalg.qr(a.mT @ (b.mT @ (b @ (a @ _first_directions(a, rank)))))[0])
    for num_left in reversed(range(MAX_SINGLE_PASSES)):
        x = np.linalg.qr(x)[0]
        v, s, ut = np.linalg.svd((a.mT @ (b.mT @ x)).astype(np.float64), full_matrices=False)
        y = left.astype(np.float64) @ (right @ v[..., :rank])
        ritz = s * (sizes[0] * sizes[1])[..., None]
        residual = (y - (x @ ut.mT[..., :rank]) * ritz[..., None, :rank]) * ritz[..., None, :rank]
        fall, fall_of_pass = (s[..., m] / (s[..., rank - 1] + TINY) for m in (rank, -1))
        bound = _error_bound(ritz, residual) * fall  # that of x, times what y is ahead
        is_safe = left.shape[-1] * np.square(s).sum(-1) > CANCELLATION
        found = is_safe & (bound <= SINGLE_ERROR * ritz[..., 0])
        has_hope = is_safe & (bound * fall_of_pass ** (2 * num_left) <= SINGLE_ERROR * ritz[..., 0])
        if (found | ~has_hope).all():
            break
        x = b @ (a @ v.astype(np.float32))
    q, upper = np.linalg.qr(y)
    u, s, wt = np.linalg.svd(upper)
    return (q @ u, s, wt @ v.mT[..., :rank, :]), found


def _unit(factor: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return ``factor / size`` in single precision."""
    inverse = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)[..., None, None]
    return np.asarray(np.multiply(factor, inverse, dtype=np.float32, casting="same_kind"))


def _first_directions(a: np.ndarray, rank: int) -> np.ndarray:
    """Return ``[..., d_in, 2 rank]``: the sum of the blocks of ``rank`` rows of ``a``, and random directions.

    Where clients began with the same factors, the sum is close to the leading right space. The random directions leave
    nothing out.
    """
    rows = a[..., : a.shape[-2] // rank * rank, :]
    common = rows.reshape(*rows.shape[:-2], -1, rank, rows.shape[-1]).sum(-3).mT
    start = np.broadcast_to(_start(a.shape[-1], rank), common.shape).astype(np.float32)
    return np.concatenate([common, start * np.abs(common).max((-2, -1), keepdims=True)], -1)


def _by_gram_matrices(left: np.ndarray, right: np.ndarray, rank: int) -> Triplets:
    """Compute the triplets in double precision from a Gram matrix."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    basis = _leading_space(left, right, rank)
    v, s, ut = np.linalg.svd(right.mT @ (left.mT @ basis), full_matrices=False)  # tall is faster than wide
    return basis @ ut.mT, s, v.mT


def _leading_space(left: np.ndarray, right: np.ndarray, rank: int) -> np.ndarray:
    """Return orthonormal columns that span the leading left singular vectors of M, ``[..., d_out, q]``.

    With ``right right^T = C C^T``, M has the singular values of ``left C``, whose Gram matrix is of order n.
    """
    d_out, d_in, inner = left.shape[-2], right.shape[-1], left.shape[-1]
    if inner < min(d_out, d_in):
        gram_left, gram_right = left.mT @ left, right @ right.mT
        root = _root(gram_right)
        gram = root.mT @ gram_left @ root
        if (inner * _trace(gram) > CANCELLATION * _trace(gram_left) * _trace(gram_right)).all():
            return np.linalg.qr(left @ (root @ leading_eigenvectors(gram, rank)))[0]
    product = left @ right
    if d_out < d_in:
        return leading_eigenvectors(product @ product.mT, rank)
    return np.linalg.qr(product @ leading_eigenvectors(product.mT @ product, rank))[0]


def leading_eigenvectors(gram: np.ndarray, count: int) -> np.ndarray:
    """Return the eigenvectors ``[..., n, count]`` of the largest eigenvalues of Gram matrices ``[..., n, n]``.

    They are in descending order of the eigenvalues, computed by subspace iteration (Halko, Martinsson and Tropp 2011)
    with twice as many directions. Clients that have moved by (b, a) from the same (B, A) have the mean product ``(B +
    mean b)(A + mean a)``, of rank r, plus the covariance of b and a, which is small, so few passes are needed. The
    iteration ends when the residuals bound the errors of the products. LAPACK computes what has not converged after as
    many passes as LAPACK would take.
    """
    size, block = gram.shape[-1], 2 * count
    vectors: np.ndarray = np.empty((*gram.shape[:-1], min(count, size)))
    converged = np.zeros(gram.shape[:-2], bool)
    if size > max(MAX_DIRECT_ORDER, 2 * block):
        x = np.linalg.qr(gram @ (gram @ _start(size, block)))[0]
        for _ in range(size // 24):
            x = np.linalg.qr(gram @ (gram @ x))[0]
            image = gram @ x
            values, rotation = np.linalg.eigh(x.mT @ image)
            # in descending order; copied, since BLAS takes no negative strides
            values, rotation = values[..., ::-1], rotation[..., : -count - 1 : -1].copy()
            vectors = x @ rotation
            residual = image @ rotation - vectors * values[..., None, :count]
            s = np.sqrt(values.clip(0))
            converged = _error_bound(s, residual) <= PRODUCT_ERROR * s[..., 0]
            if converged.all():
                return vectors
    vectors[~converged] = np.linalg.eigh(gram[~converged])[1][..., : -count - 1 : -1]
    return vectors


def _error_bound(s: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Return how far the rank-r product of Ritz vectors of ``M M^T`` or ``M^T M`` is from the best one, ``[...]``.

    Mixing direction j <= r with m > r by an angle t changes the product by ``t sqrt(s_j^2 + s_m^2)``, and a residual e
    leaves ``t = e / (s_j^2 - s_m^2)``; so the change is at most ``sqrt(2) e / (s_r - s_(r+1))``.

    Args:
        s: ``[..., 2 r]`` Ritz values (singular values) in descending order.
        residual: ``[..., n, r]``, ``gram x - x s^2`` of the first r.
    """
    count = residual.shape[-1]
    error = np.sqrt(2) * np.linalg.norm(residual, axis=(-2, -1))
    gap = s[..., count - 1] - s[..., count]
    return np.asarray(np.divide(error, gap, out=np.full_like(error, np.finfo(np.float64).max), where=gap > 0))


def _root(gram: np.ndarray) -> np.ndarray:
    """Return C with ``C C^T = gram`` up to rounding; a small shift makes singular matrices factorisable."""
    size = gram.shape[-1]
    shift = size * EPS * _trace(gram) + np.finfo(np.float64).tiny
    return np.linalg.cholesky(gram + shift[..., None, None] * np.eye(size))


def _trace(gram: np.ndarray) -> np.ndarray:
    return np.asarray(np.trace(gram, axis1=-2, axis2=-1))


@cache
def _start(size: int, block: int) -> np.ndarray:
    """Return the start of the iteration: the same normal random numbers every time, which leave no direction out."""
    return np.random.default_rng(0).normal(size=(size, block))

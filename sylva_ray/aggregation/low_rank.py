"""The best rank-r approximation of a product of two long factors, ``M = left [d_out, n] @ right [n, d_in]``.

The leading singular directions are computed from the smallest Gram matrix that has the squared singular values of M:
one of order n from the Gram matrices of the factors where n is small, otherwise one of order min(d_out, d_in) from M.
Squaring loses half the digits, so singular values below about 1e-7 of the largest are lost. The others are not
affected: M itself is projected on the directions, and the triplets are those of the projection (Rayleigh-Ritz).

All functions work on stacks: ``...`` are leading axes, e.g. modules of equal shapes.
"""

from __future__ import annotations

from functools import cache

import numpy as np

PRODUCT_ERROR = 1e-7
"""Largest error (Frobenius norm) against the best product, as a fraction of the largest singular value."""

MAX_DIRECT_ORDER = 32
"""Matrices up to this order are given to LAPACK: an iteration would not be faster."""

CANCELLATION = 0.1
"""Smallest ``n ||M||^2 / (||left||^2 ||right||^2)`` (Frobenius) for which the Gram matrices of the factors are used.

Below it so much cancels in the sum that their rounding errors would matter, and M is formed. Unrelated factors have 1,
factors with a common part more."""

EPS = np.finfo(np.float64).eps


def leading_triplets(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ``rank`` largest singular triplets of ``left [..., d_out, n] @ right [..., n, d_in]``.

    Returns:
        ``u [..., d_out, q]``, ``s [..., q]`` in descending order, ``vt [..., q, d_in]``, all float64, where q is
        ``rank`` or less. Their product is within `PRODUCT_ERROR` of the best one if singular values r and r + 1 differ;
        if they are equal, the best one is not unique.
    """
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
            converged = _is_converged(values, residual)
            if converged.all():
                return vectors
    vectors[~converged] = np.linalg.eigh(gram[~converged])[1][..., : -count - 1 : -1]
    return vectors


def _is_converged(values: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Return whether the rank-r product of these Ritz vectors is as good as the best, ``[...] bool``.

    Mixing direction j <= r with m > r by an angle t changes the product by ``t sqrt(s_j^2 + s_m^2)``, and a residual e
    leaves ``t = e / (s_j^2 - s_m^2)``; so the change is at most ``sqrt(2) e / (s_r - s_(r+1))``.

    Args:
        values: ``[..., 2 r]`` Ritz values (squared singular values) in descending order.
        residual: ``[..., n, r]``, ``gram x - x value`` of the first r.
    """
    s, count = np.sqrt(values.clip(0)), residual.shape[-1]
    error = np.sqrt(2) * np.linalg.norm(residual, axis=(-2, -1))
    return np.asarray(error <= PRODUCT_ERROR * s[..., 0] * (s[..., count - 1] - s[..., count]))


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

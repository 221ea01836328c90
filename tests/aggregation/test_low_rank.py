"""The best rank-r product of stacked factors against a dense SVD: every shape, and spectra that make it hard."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_ray.aggregation.low_rank import leading_eigenvectors, leading_triplets

TOLERANCE = 1e-6

SHAPES = {  # d_out, d_in, n, rank
    "few clients": (30, 20, 8, 4),
    "one client": (30, 20, 4, 4),
    "iterated": (90, 70, 64, 4),
    "iterated, wide": (70, 90, 64, 4),
    "stack wider than the product": (60, 40, 100, 4),
    "the same, wide": (40, 60, 100, 4),
    "rank above d": (5, 40, 12, 8),
    "rank above n": (30, 20, 3, 8),
    "one direction": (90, 70, 64, 1),
}

SPECTRA: dict[str, Callable[[int], np.ndarray]] = {  # of m values
    "falls fast": lambda m: 0.5 ** np.arange(m),
    "falls by a power": lambda m: 1 / np.arange(1, m + 1),
    "falls slowly": lambda m: np.linspace(1, 0.5, m),
    "hardly falls": lambda m: 1 - 1e-4 * np.arange(m),
    "in pairs": lambda m: 0.7 ** (np.arange(m) // 2),
    "all equal": lambda m: np.ones(m),
    "a small gap after the fourth": lambda m: np.where(np.arange(m) < 4, 1, 1 - 1e-5),
    "three directions": lambda m: np.where(np.arange(m) < 3, 0.5 ** np.arange(m), 0),
    "over six decades": lambda m: np.logspace(0, -6, m),
    "nothing": np.zeros,
}


def orthonormal(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, count)))[0]


def factors_of(
    spectrum: Callable[[int], np.ndarray], d_out: int, d_in: int, inner: int, seed: int = 0, skewed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """left, right whose product has these singular values; skewed: neither factor shows them."""
    rng, count = np.random.default_rng(seed), min(d_out, d_in, inner)
    u, v = orthonormal(rng, d_out, count) * spectrum(count), orthonormal(rng, d_in, count)
    mix = rng.normal(size=(count, inner)) if skewed else orthonormal(rng, inner, count).T
    return u @ mix, np.linalg.pinv(mix) @ v.T


def best(product: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


def product_of(triplets: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    u, s, vt = triplets
    return np.asarray((u * s[..., None, :]) @ vt)


def assert_best(left: np.ndarray, right: np.ndarray, rank: int) -> None:
    """No product of this rank is closer, and where only one is best it is that one."""
    u, s, vt = leading_triplets(left, right, rank)
    wanted, values = best(left @ right, rank)
    found, scale = product_of((u, s, vt)), values[0]
    error, tail = np.linalg.norm(left @ right - found), np.linalg.norm(values[rank:])
    assert abs(error - tail) <= TOLERANCE * scale
    np.testing.assert_allclose(s, values[: len(s)], atol=TOLERANCE * scale)
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-10)
    np.testing.assert_allclose(vt @ vt.T, np.eye(len(s)), atol=1e-10)
    if rank < len(values) and values[rank - 1] - values[rank] > TOLERANCE * scale:
        assert np.linalg.norm(found - wanted) <= TOLERANCE * scale


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_product_of_that_rank_is_closer(shape: str, spectrum: str, skewed: bool) -> None:
    d_out, d_in, inner, rank = SHAPES[shape]
    assert_best(*factors_of(SPECTRA[spectrum], d_out, d_in, inner, skewed=skewed), rank)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 80)),
    rank=st.integers(1, 6),
    decay=st.floats(0.3, 1.0),
    seed=st.integers(0, 10**6),
    skewed=st.booleans(),
)
def test_random_shapes_and_decays(
    sizes: tuple[int, int, int], rank: int, decay: float, seed: int, skewed: bool
) -> None:
    assert_best(*factors_of(lambda m: decay ** np.arange(m), *sizes, seed, skewed), rank)


def moved_clients(count: int, d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Factors of clients that moved a little away from a common state, side by side."""
    rng = np.random.default_rng(seed)
    b, a = orthonormal(rng, d_out, rank) * np.linspace(1, 0.2, rank), orthonormal(rng, d_in, rank).T
    left = np.concatenate([b + 0.03 * rng.normal(size=b.shape) for _ in range(count)], axis=1)
    return left / count, np.concatenate([a + 0.02 * rng.normal(size=a.shape) for _ in range(count)])


def unrelated_clients(count: int, d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(d_out, count * rank)), rng.normal(size=(count * rank, d_in))


@pytest.mark.parametrize("count", [10, 40])
@pytest.mark.parametrize("clients", [moved_clients, unrelated_clients])
def test_adapters_of_the_offline_backbone(clients: Callable[..., tuple[np.ndarray, np.ndarray]], count: int) -> None:
    """Layer qkv of width 192, rank 8: ten neighbours, or so many clients that their stack is wider than the product."""
    assert_best(*clients(count, 576, 192, 8), 8)


def test_lapack_is_asked_only_where_the_spectrum_falls_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    orders, eigh = [], np.linalg.eigh

    def noted(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        orders.append(matrix.shape[-1])
        return eigh(matrix)

    monkeypatch.setattr(np.linalg, "eigh", noted)
    leading_triplets(*moved_clients(10, 120, 100, 8), 8)
    leading_triplets(*moved_clients(100, 120, 100, 8), 8)
    assert not orders
    leading_triplets(*unrelated_clients(10, 120, 100, 8), 8)
    assert max(orders) == 10 * 8


def test_eigenvectors_come_in_falling_order() -> None:
    rng = np.random.default_rng(0)
    vectors = orthonormal(rng, 50, 50)
    gram = (vectors * 0.5 ** np.arange(50)) @ vectors.T
    found = leading_eigenvectors(gram, 3)
    np.testing.assert_allclose(np.abs(found.T @ vectors[:, :3]), np.eye(3), atol=1e-6)


def test_a_stack_is_its_modules() -> None:
    """Also where one module is settled at once and the other is left to LAPACK."""
    pairs = [moved_clients(10, 120, 100, 8), unrelated_clients(10, 120, 100, 8)]
    left, right = (np.stack(side) for side in zip(*pairs, strict=True))
    together = product_of(leading_triplets(left, right, 8))
    for found, (own_left, own_right) in zip(together, pairs, strict=True):
        scale = float(np.linalg.norm(own_left @ own_right, 2))
        alone = product_of(leading_triplets(own_left, own_right, 8))
        np.testing.assert_allclose(found, alone, atol=TOLERANCE * scale)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_the_scale_does_not_matter(size: float) -> None:
    left, right = moved_clients(10, 120, 100, 8)
    assert_best(size * left, right, 8)
    assert_best(left, size * right, 8)


@pytest.mark.parametrize("rest", [1e-3, 1e-6])
def test_what_remains_when_factors_cancel(rest: float) -> None:
    """(B, A) and (-B, A) leave nothing of a million times the rest."""
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(60, 8)), rng.normal(size=(8, 50))
    small_b, small_a = rest * rng.normal(size=(60, 20)), rng.normal(size=(20, 50))
    assert_best(np.hstack([b, small_b, -b]), np.vstack([a, small_a, a]), 8)


@pytest.mark.parametrize("equal", ["left", "right", "both"])
def test_clients_with_a_factor_in_common(equal: str) -> None:
    """Gram matrices are singular then."""
    left, right = moved_clients(10, 120, 100, 8)
    if equal != "right":
        left = np.tile(left[:, :8], 10)
    if equal != "left":
        right = np.tile(right[:8], (10, 1))
    assert_best(left, right, 8)


def test_the_same_bits_again() -> None:
    left, right = moved_clients(10, 120, 100, 8)
    assert all(map(np.array_equal, leading_triplets(left, right, 8), leading_triplets(left, right, 8)))

"""FLoRA and FedEx-LoRA are exact, and each rule moves as many numbers as its arrays hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_ray.aggregation.exact import (
    RULES,
    download_floats,
    fedex_residual,
    fedex_residual_factors,
    flora_stack,
    upload_floats,
)
from sylva_ray.aggregation.factors import average
from tests.aggregation.test_factors import merge_products

D_OUT, D_IN = 7, 9


def clients(
    ranks: Sequence[int], seed: int = 0, dtype: npt.DTypeLike = np.float64
) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(D_OUT, r)).astype(dtype), rng.normal(size=(r, D_IN)).astype(dtype)) for r in ranks]


def shares(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(count))


def naive(factors: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    states = [{"b": b, "a": a} for b, a in factors]
    mean = average(states[0], states, weights)
    return mean["b"], mean["a"]


def product_svd(factors: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rank = min(D_OUT, sum(a.shape[0] for _, a in factors))
    return merge_products(np.ones((rank, D_IN)), factors, weights)


def fedex(factors: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray) -> np.ndarray:
    b, a = naive(factors, weights)
    return np.asarray(b @ a + fedex_residual(factors, weights))


def fedex_low_rank(factors: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray) -> np.ndarray:
    (b, a), (left, right) = naive(factors, weights), fedex_residual_factors(factors, weights)
    return np.asarray(b @ a + left @ right)


EXACT = {
    "flora": lambda factors, weights: np.matmul(*flora_stack(factors, weights)),
    "fedex": fedex,
    "fedex_low_rank": fedex_low_rank,
    "product_svd": lambda factors, weights: np.matmul(*product_svd(factors, weights)),
}
exact = pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT)


def mean_product(factors: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray) -> np.ndarray:
    return np.asarray(sum(w * b @ a for w, (b, a) in zip(weights, factors, strict=True)))


@exact
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 5), rank=st.integers(1, 4), seed=st.integers(0, 999))
def test_exact_rules_give_the_mean_product(rule: Callable[..., np.ndarray], count: int, rank: int, seed: int) -> None:
    factors, w = clients([rank] * count, seed), shares(count, seed)
    np.testing.assert_allclose(rule(factors, w), mean_product(factors, w), atol=1e-10)


def test_the_fedex_residual_is_the_bias_of_the_naive_rule() -> None:
    factors, w = clients([3] * 5), np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    bias = mean_product(factors, w) - np.matmul(*naive(factors, w))
    np.testing.assert_allclose(fedex_residual(factors, w), bias, atol=1e-10)
    assert np.linalg.norm(bias) > 0.3 * np.linalg.norm(mean_product(factors, w))


@exact
def test_two_signs_of_one_model_are_that_model(rule: Callable[..., np.ndarray]) -> None:
    ((b, a),) = clients([2])
    factors, half = [(b, a), (-b, -a)], np.array([0.5, 0.5])
    np.testing.assert_allclose(np.matmul(*naive(factors, half)), 0, atol=1e-12)
    np.testing.assert_allclose(rule(factors, half), b @ a, atol=1e-12)


@exact
def test_another_basis_of_one_client_changes_no_product(rule: Callable[..., np.ndarray]) -> None:
    factors, w = clients([3] * 4), shares(4)
    basis = np.random.default_rng(1).normal(size=(3, 3)) + 3 * np.eye(3)
    turned = [(factors[0][0] @ basis, np.linalg.solve(basis, factors[0][1])), *factors[1:]]
    np.testing.assert_allclose(rule(turned, w), rule(factors, w), atol=1e-10)
    assert np.abs(np.matmul(*naive(turned, w)) - np.matmul(*naive(factors, w))).max() > 0.01


def test_flora_weighs_one_factor_only_and_takes_any_ranks() -> None:
    factors, w = clients([1, 4, 2]), np.array([0.2, 0.5, 0.3])
    b, a = flora_stack(factors, w)
    np.testing.assert_allclose(b @ a, mean_product(factors, w), atol=1e-12)
    both = np.repeat(w, [1, 4, 2]) * b
    assert np.linalg.norm(both @ a - mean_product(factors, w)) > 0.3 * np.linalg.norm(mean_product(factors, w))


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_fedex_repairs_w(scaling: float) -> None:
    factors, w = clients([3] * 4), np.full(4, 0.25)
    frozen = np.random.default_rng(2).normal(size=(D_OUT, D_IN))
    b, a = naive(factors, w)
    np.testing.assert_allclose(
        frozen + scaling * b @ a + scaling * fedex_residual(factors, w),
        frozen + scaling * np.mean([b @ a for b, a in factors], axis=0),
        atol=1e-12,
    )


def test_equal_clients_leave_no_residual_and_are_themselves() -> None:
    factors = clients([3], dtype=np.float32) * 4
    w = shares(4)
    assert not fedex_residual(factors, w).any()
    assert not np.matmul(*fedex_residual_factors(factors, w)).any()


def test_results_keep_the_dtype_of_the_factors() -> None:
    factors, w = clients([2, 2, 2], dtype=np.float32), shares(3)
    results = [
        *flora_stack(factors, w),
        fedex_residual(factors, w),
        *fedex_residual_factors(factors, w),
    ]
    assert {value.dtype for value in results} == {np.dtype(np.float32)}


def size(*arrays: np.ndarray) -> int:
    return sum(array.size for array in arrays)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("rank", [1, 4])
def test_bytes_are_those_of_the_arrays(count: int, rank: int) -> None:
    """What a client holds and what the server makes of it, counted."""
    factors, w, ranks = clients([rank] * count), shares(count), [rank] * count
    b, a = factors[0]
    mean_b, mean_a = naive(factors, w)
    residual = min(size(*fedex_residual_factors(factors, w)), size(fedex_residual(factors, w)))
    arrays = {
        "naive": (size(b, a), size(mean_b, mean_a)),
        "product_svd": (size(b, a), size(*merge_products(a, factors, w))),
        "ffa": (size(b), size(mean_b)),
        "fedsa": (size(a), size(mean_a)),
        "flora": (size(b, a), size(*flora_stack(factors, w))),
        "fedex": (size(b, a), size(mean_b, mean_a) + residual),
    }
    assert tuple(arrays) == RULES
    for rule, (up, down) in arrays.items():
        assert upload_floats(rule, D_IN, D_OUT, rank) == up, rule
        assert download_floats(rule, D_IN, D_OUT, ranks) == down, rule


def test_bytes_of_unequal_ranks() -> None:
    ranks = [1, 4, 2]
    factors = clients(ranks)
    for receiver in range(3):
        assert download_floats("naive", D_IN, D_OUT, ranks, receiver) == size(*factors[receiver])
    assert download_floats("flora", D_IN, D_OUT, ranks, 1) == size(*flora_stack(factors, shares(3)))


def test_fedex_sends_the_residual_dense_once_that_is_less() -> None:
    d = D_IN + D_OUT
    assert download_floats("fedex", D_IN, D_OUT, [2] * 2) == 2 * d + 2 * d
    assert download_floats("fedex", D_IN, D_OUT, [2] * 9) == 2 * d + D_IN * D_OUT


@pytest.mark.parametrize(("d_out", "total"), [(3 * 768, 36_864), (768, 18_432)])
def test_vit_b16_modules(d_out: int, total: int) -> None:
    """Of the two target modules, 12 layers, per rank (A and B)."""
    assert 12 * upload_floats("naive", 768, d_out, 1) == total
    assert 12 * (upload_floats("ffa", 768, d_out, 1) + upload_floats("fedsa", 768, d_out, 1)) == total


@pytest.mark.parametrize(
    "call",
    [
        lambda: flora_stack(clients([1, 1]), [0.5, 0.6]),
        lambda: fedex_residual(clients([1, 1]), [0.5, np.nan]),
        lambda: upload_floats("mean", 1, 1, 1),
    ],
)
def test_wrong_calls(call: Callable[[], object]) -> None:
    with pytest.raises(AssertionError):
        call()

"""Shapley values against textbook games, the axioms, and an independent library."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_ray.federation.stages.layer_game.shapley import (
    ShapleyEstimate,
    all_coalitions,
    antithetic_permutations,
    exact_shapley,
    permutation_shapley,
    prefix_coalitions,
)


def game(function: Callable[[set[int]], float], n: int) -> np.ndarray:
    return np.array([function({p for p in range(n) if row[p]}) for row in all_coalitions(n)], float)


def sampled(values_of: np.ndarray, n: int, pairs: int, seed: int) -> ShapleyEstimate:
    permutations = antithetic_permutations(n, pairs, np.random.default_rng(seed))
    coalitions = prefix_coalitions(permutations)
    values = np.array([values_of[np.dot(row, 1 << np.arange(n))] for row in coalitions])
    return permutation_shapley(permutations, coalitions, values)


def test_coalitions_are_counted_in_bits() -> None:
    rows = all_coalitions(3)
    assert rows.shape == (8, 3)
    assert rows[5].tolist() == [True, False, True]


def test_gloves_and_airport() -> None:
    gloves = game(lambda s: float(0 in s and bool(s & {1, 2})), 3)
    np.testing.assert_allclose(exact_shapley(gloves), [2 / 3, 1 / 6, 1 / 6])
    airport = game(lambda s: max((p + 1 for p in s), default=0), 3)
    np.testing.assert_allclose(exact_shapley(airport), [1 / 3, 5 / 6, 11 / 6])


def quadratic(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=n), np.triu(rng.normal(size=(n, n)), 1)
    rows = all_coalitions(n).astype(float)
    return rows @ a + np.einsum("si,ij,sj->s", rows, b, rows), a + (b + b.T).sum(1) / 2


def test_a_quadratic_game_splits_each_interaction_in_half() -> None:
    values, expected = quadratic(5, 0)
    np.testing.assert_allclose(exact_shapley(values), expected)


def test_one_antithetic_pair_is_exact_for_pairwise_interactions() -> None:
    values, expected = quadratic(6, 1)
    estimate = sampled(values, 6, 2, 0)
    np.testing.assert_allclose(estimate.value, expected)
    np.testing.assert_allclose(estimate.half_width, 0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_axioms(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    v, w = rng.normal(size=(2, 2**n))
    phi = exact_shapley(v)
    assert phi.sum() == pytest.approx(v[-1] - v[0], abs=1e-9)  # efficiency
    np.testing.assert_allclose(exact_shapley(2 * v + w), 2 * phi + exact_shapley(w), atol=1e-9)  # linearity
    np.testing.assert_allclose(exact_shapley(np.stack([v, w], -1)), np.stack([phi, exact_shapley(w)], -1))
    rows = all_coalitions(n)
    without_first = (rows[:, 1:] @ (1 << np.arange(1, n))).astype(int) if n > 1 else np.zeros(2**n, int)
    assert exact_shapley(v[without_first])[0] == pytest.approx(0, abs=1e-12)  # a dummy earns nothing
    by_size = v[rows.sum(1)]
    np.testing.assert_allclose(np.ptp(exact_shapley(by_size)), 0, atol=1e-9)  # symmetric players earn the same


def test_sampling_is_efficient_too_and_within_hoeffding() -> None:
    n, pairs = 6, 200
    values = np.random.default_rng(3).random(2**n)
    # the independent draws are the pairs; a marginal lies in [-1, 1]: radius^2 = 2^2 ln(2 n / delta) / (2 pairs)
    exact, radius = exact_shapley(values), np.sqrt(4 * np.log(2 * n / 0.01) / (2 * pairs))
    for seed in range(20):
        estimate = sampled(values, n, pairs, seed)
        assert estimate.value.sum() == pytest.approx(values[-1] - values[0])
        assert np.abs(estimate.value - exact).max() < radius


def test_half_width_by_hand() -> None:
    """Three players who achieve 1 together and nothing apart: of every pair, first and last of the order get 1/2.

    The pairs of (0, 1, 2) and (0, 2, 1) give players 1 and 2 the shares (0, 1/2): standard error
    sqrt(1/8) / sqrt(2) = 1/4. Student's t at 97.5 % with one degree of freedom is tan(0.475 pi).
    """
    permutations = np.array([[0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 2, 0]])
    coalitions = prefix_coalitions(permutations)
    estimate = permutation_shapley(permutations, coalitions, coalitions.all(1).astype(float))
    np.testing.assert_allclose(estimate.value, [1 / 2, 1 / 4, 1 / 4])
    np.testing.assert_allclose(estimate.half_width, np.tan(0.475 * np.pi) * np.array([0, 1 / 4, 1 / 4]), atol=1e-12)
    with pytest.raises(AssertionError, match="two antithetic pairs"):
        permutation_shapley(permutations[:2], coalitions, coalitions.all(1).astype(float))


def test_prefixes_are_few_distinct_and_hold_both_ends() -> None:
    rows = prefix_coalitions(antithetic_permutations(6, 5, np.random.default_rng(0)))
    assert not rows[0].any()
    assert rows[-1].all()
    assert len(rows) == len(np.unique(rows, axis=0)) <= 10 * 5 + 2


def test_counts_in_unsigned_bytes_are_numbers_too() -> None:
    np.testing.assert_allclose(exact_shapley(np.array([3, 1, 1, 2], np.uint8)), [-0.5, -0.5])


def test_intervals_cover_about_as_often_as_they_say() -> None:
    n = 5
    values = np.random.default_rng(4).random(2**n)
    exact = exact_shapley(values)
    covered = np.mean([np.abs((e := sampled(values, n, 30, s)).value - exact) <= e.half_width for s in range(200)])
    assert 0.9 < covered < 0.99


def test_antithetic_orders_are_permutations_and_their_reverses() -> None:
    orders = antithetic_permutations(6, 4, np.random.default_rng(0))
    assert orders.shape == (8, 6)
    for forward, backward in list(pairwise(orders))[::2]:
        assert sorted(forward) == list(range(6))
        assert forward[::-1].tolist() == backward.tolist()


def test_an_independent_library_agrees() -> None:
    shapiq = pytest.importorskip("shapiq", reason="the oracle is not installed")
    n = 5
    values = np.random.default_rng(5).random(2**n)

    def value(rows: np.ndarray) -> np.ndarray:
        return np.asarray(values[(np.atleast_2d(rows) @ (1 << np.arange(n))).astype(int)])

    theirs = shapiq.ExactComputer(n_players=n, game=value)("SV")
    ours = exact_shapley(values)
    for player in range(n):
        assert theirs[(player,)] == pytest.approx(ours[player], abs=1e-9)

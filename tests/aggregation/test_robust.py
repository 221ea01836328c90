"""Robust rules against direct implementations on coordinates, known answers, equivariances and gross outliers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from sylva_ray.aggregation.neighbours import product_gram
from sylva_ray.aggregation.robust import (
    CLIPPING_ITERATIONS,
    COMBINATION_RULES,
    COORDINATE_RULES,
    buckets,
    combination,
    coordinate_median,
    min_clients,
    self_centred,
    trimmed_mean,
)

CLIPPING = ("norm_clipping", "centred_clipping")
SELECTING = ("krum", "multi_krum", "geometric_median")

seeds = st.integers(0, 9999)
few = settings(max_examples=40, deadline=None)


def aggregate(rule: str, x: npt.ArrayLike, num_byzantine: int = 0) -> np.ndarray:
    """Any rule on points ``[n, d]``; self-centred clipping from the first of them."""
    x = np.asarray(x, float)
    if rule == "coordinate_median":
        return coordinate_median(x)
    if rule == "trimmed_mean":
        return trimmed_mean(x, num_byzantine)
    if rule == "self_centred_clipping":
        return np.asarray(self_centred(x @ x.T, np.full(len(x), 1 / len(x)), 0) @ x)
    return np.asarray(combination(rule, x @ x.T, num_byzantine) @ x)


ALL_RULES = (*COMBINATION_RULES, *COORDINATE_RULES, "self_centred_clipping")


def points(seed: int, n: int, d: int = 4, offset: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + offset * rng.normal(size=d)


# --- direct implementations, on coordinates ---------------------------------------------------------------------------


def shrink(vector: np.ndarray, radius: float) -> np.ndarray:
    length = np.linalg.norm(vector)
    return vector if length <= radius else vector * radius / length


def naive_krum_scores(x: np.ndarray, num_byzantine: int) -> list[float]:
    return [
        sum(sorted(float(np.linalg.norm(a - b)) ** 2 for j, b in enumerate(x) if j != i)[: len(x) - num_byzantine - 2])
        for i, a in enumerate(x)
    ]


def naive(rule: str, x: np.ndarray, num_byzantine: int) -> np.ndarray:
    if rule == "mean":
        return np.asarray(x.mean(0))
    if rule == "krum":
        return np.asarray(x[np.argmin(naive_krum_scores(x, num_byzantine))])
    if rule == "multi_krum":
        return np.asarray(x[np.argsort(naive_krum_scores(x, num_byzantine))[: len(x) - num_byzantine]].mean(0))
    if rule == "norm_clipping":
        radius = np.median([np.linalg.norm(a) for a in x])
        return np.asarray(np.mean([shrink(a, radius) for a in x], axis=0))
    assert rule == "centred_clipping"
    v = np.zeros(x.shape[1])
    for _ in range(3):
        radius = np.median([np.linalg.norm(a - v) for a in x])
        v = v + np.mean([shrink(a - v, radius) for a in x], axis=0)
    return v


def sum_of_distances(z: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(x - z, axis=1).sum())


@pytest.mark.parametrize("rule", [rule for rule in COMBINATION_RULES if rule != "geometric_median"])
@few
@given(seed=seeds, num_byzantine=st.integers(0, 2), extra=st.integers(1, 5), d=st.integers(2, 6))
def test_the_gram_matrix_suffices(rule: str, seed: int, num_byzantine: int, extra: int, d: int) -> None:
    x = points(seed, 2 * num_byzantine + 3 + extra, d)
    np.testing.assert_allclose(aggregate(rule, x, num_byzantine), naive(rule, x, num_byzantine), atol=1e-9)


@few
@given(seed=seeds, n=st.integers(3, 12), d=st.integers(1, 5), heavy=st.integers(0, 3))
def test_the_geometric_median_minimises_the_sum_of_distances(seed: int, n: int, d: int, heavy: int) -> None:
    """Against a general optimiser, which has every input as a further candidate; ``heavy`` repeats an input."""
    x = points(seed, n, d)
    x = np.concatenate([x, np.repeat(x[:1], heavy, axis=0)])
    starts = [*x, minimize(sum_of_distances, x.mean(0), args=(x,), method="Nelder-Mead", options={"xatol": 1e-9}).x]
    assert sum_of_distances(aggregate("geometric_median", x), x) <= min(
        sum_of_distances(z, x) for z in starts
    ) + 1e-6 * sum_of_distances(x.mean(0), x)


@few
@given(seed=seeds, n=st.integers(2, 7))
def test_self_centred_clipping_on_coordinates(seed: int, n: int) -> None:
    x, w = points(seed, n), np.random.default_rng(seed).dirichlet(np.ones(n))
    for own in range(n):
        tau = sorted(float(np.linalg.norm(x[j] - x[own])) for j in range(n) if j != own)[(n - 2) // 2]
        expected = sum(w[j] * (x[own] + shrink(x[j] - x[own], tau)) for j in range(n))
        np.testing.assert_allclose(self_centred(x @ x.T, w, own) @ x, expected, atol=1e-9)


def test_who_has_no_weight_does_not_count() -> None:
    x = points(3, 6)
    w = np.array([0.4, 0.3, 0.0, 0.2, 0.0, 0.1])
    kept = w > 0
    c = self_centred(x @ x.T, w, 3)
    np.testing.assert_allclose(c[kept], self_centred(x[kept] @ x[kept].T, w[kept], 2))
    assert not c[~kept].any()
    np.testing.assert_array_equal(self_centred(x @ x.T, np.eye(6)[4], 4), np.eye(6)[4])  # alone


def test_two_expressions_of_one_adapter_are_one_input() -> None:
    """The coefficients from LoRA factors are those of the dense products, in whatever gauge the factors come."""
    rng = np.random.default_rng(5)
    plain, turned, dense = [], [], []
    for _ in range(7):
        a, b, r = rng.normal(size=(2, 9)), rng.normal(size=(7, 2)), rng.normal(size=(2, 2))
        plain.append({"m.lora_A": a, "m.lora_B": b})
        turned.append({"m.lora_A": np.linalg.inv(r) @ a, "m.lora_B": b @ r})
        dense.append((b @ a).ravel())
    x = np.array(dense)
    for rule in COMBINATION_RULES:
        expected = naive(rule, x, 2) if rule != "geometric_median" else aggregate(rule, x, 2)
        for states in (plain, turned):
            np.testing.assert_allclose(combination(rule, product_gram(states), 2) @ x, expected, atol=1e-7)


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e6])
def test_identical_inputs_are_the_result(rule: str, size: float) -> None:
    x = size * points(1, 1)[0]
    np.testing.assert_allclose(aggregate(rule, np.tile(x, (5, 1))), x, rtol=1e-12)


@pytest.mark.parametrize("rule", ALL_RULES)
@few
@given(seed=seeds, n=st.integers(7, 11))
def test_translation(rule: str, seed: int, n: int) -> None:
    """Updates are relative to the last aggregate; the rules that clip towards it are not free to move it."""
    x, shift = points(seed, n), np.array([3.0, -1.0, 2.0, 5.0])
    moved = aggregate(rule, x + shift, 2) - aggregate(rule, x, 2) - shift
    if rule in CLIPPING:
        assert np.linalg.norm(moved) > 1e-3
    else:
        np.testing.assert_allclose(moved, 0, atol=2e-5)


@pytest.mark.parametrize("rule", ALL_RULES)
@few
@given(seed=seeds, scale=st.sampled_from([1e-6, 0.1, 30.0, 1e6]))
def test_scale_and_rotation(rule: str, seed: int, scale: float) -> None:
    """No absolute length is built in, and those rules that see only inner products do not see a rotation."""
    x = points(seed, 9)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))
    plain = aggregate(rule, x, 2)
    np.testing.assert_allclose(aggregate(rule, scale * x, 2), scale * plain, atol=2e-5 * scale)
    if rule not in COORDINATE_RULES:
        np.testing.assert_allclose(aggregate(rule, x @ turn, 2), plain @ turn, atol=2e-5)


@pytest.mark.parametrize("rule", [rule for rule in ALL_RULES if rule != "self_centred_clipping"])
@few
@given(seed=seeds, n=st.integers(7, 11))
def test_the_order_of_the_clients_does_not_matter(rule: str, seed: int, n: int) -> None:
    x = points(seed, n)
    shuffled = np.random.default_rng(seed).permutation(x)
    np.testing.assert_allclose(aggregate(rule, shuffled, 2), aggregate(rule, x, 2), atol=2e-5)


def test_the_order_of_the_clients_does_not_matter_for_tied_medians() -> None:
    line = np.array([[0.0], [1.0], [10.0], [11.0]])  # every point of [1, 10] is a geometric median
    assert aggregate("geometric_median", line) == pytest.approx(5.5)
    assert aggregate("geometric_median", line[::-1]) == pytest.approx(5.5)


def test_only_clipping_leaves_something_with_the_last_aggregate() -> None:
    x = points(2, 9)
    for rule in COMBINATION_RULES:
        c = combination(rule, x @ x.T, 2)
        assert c.min() >= 0
        assert (c.sum() < 0.999) if rule in CLIPPING else (abs(c.sum() - 1) < 1e-12)


# --- known answers ----------------------------------------------------------------------------------------------------


def test_known_geometric_medians() -> None:
    np.testing.assert_allclose(aggregate("geometric_median", [[0, 0], [1, 0], [10, 0]]), [1, 0], atol=1e-9)
    triangle = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
    np.testing.assert_allclose(aggregate("geometric_median", triangle), [0.5, 0.288675], atol=1e-6)
    # Fermat's point of a right isosceles triangle sees every side under 120 degrees:
    # t (1, 1) with t = (3 - sqrt 3) / 6.
    fermat = (3 - np.sqrt(3)) / 6
    np.testing.assert_allclose(aggregate("geometric_median", [[0, 0], [1, 0], [0, 1]]), [fermat, fermat], atol=1e-5)
    # A corner of more than 120 degrees is the median itself.
    np.testing.assert_allclose(aggregate("geometric_median", [[-5, 1], [0, 0], [5, 1]]), [0, 0], atol=1e-9)


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_weiszfeld_from_an_input(repeats: int) -> None:
    """The medoid is always an input. It must neither divide by zero there nor stay where it should leave."""
    x = np.array([[0.0, 0.0]] * repeats + [[2.0, 1.0], [2.0, -1.0], [3.0, 0.5]])
    with np.errstate(all="raise"):
        z = aggregate("geometric_median", x)
    if repeats == 3:  # the unit vectors to the others add up to less than 3
        np.testing.assert_array_equal(z, [0, 0])
    else:
        assert np.linalg.norm(((z - x).T / np.linalg.norm(z - x, axis=1)).sum(1)) < 1e-4


def test_known_order_statistics() -> None:
    column = np.array([[1.0], [2.0], [100.0]])
    assert coordinate_median(column) == 2
    assert coordinate_median(np.array([[1], [2], [5], [100]])) == 3.5
    assert trimmed_mean(column, 1) == 2
    assert trimmed_mean(np.array([[4], [-9], [1], [100], [7]]), 1) == 4
    with pytest.raises(AssertionError, match="2f"):
        trimmed_mean(np.zeros((4, 1)), 2)


@few
@given(seed=seeds, n=st.integers(1, 9))
def test_trimming_runs_from_the_mean_to_the_median(seed: int, n: int) -> None:
    x = points(seed, n).reshape(n, 2, 2)
    np.testing.assert_allclose(trimmed_mean(x, 0), x.mean(0), atol=1e-12)
    np.testing.assert_allclose(trimmed_mean(x, (n - 1) // 2), coordinate_median(x), atol=1e-12)


def test_krum_adds_up_squared_distances() -> None:
    """Plain distances would choose input 4, fourth powers (squaring twice) input 1."""
    x = np.array([[1, 6], [4, 0], [0, 4], [6, 3], [6, 2]], float)
    nearest = np.sort(np.linalg.norm(x[:, None] - x, axis=-1), axis=1)[:, 1:4]
    assert [int((nearest**p).sum(1).argmin()) for p in (1, 2, 4)] == [4, 3, 1]
    np.testing.assert_array_equal(combination("krum", x @ x.T, 0), np.eye(5)[3])


@few
@given(seed=seeds, num_byzantine=st.integers(0, 3))
def test_krum_returns_an_input_and_multi_krum_a_mean_of_them(seed: int, num_byzantine: int) -> None:
    n = 2 * num_byzantine + 5
    x = points(seed, n)
    krum, multi = (combination(rule, x @ x.T, num_byzantine) for rule in ("krum", "multi_krum"))
    assert sorted(krum) == [0] * (n - 1) + [1]
    np.testing.assert_allclose(np.sort(multi), [0] * num_byzantine + [1 / (n - num_byzantine)] * (n - num_byzantine))
    assert multi[krum.argmax()] > 0


def test_known_clippings() -> None:
    x = np.array([[1.0, 0.0], [0.0, 2.0], [-30.0, 0.0]])
    np.testing.assert_allclose(aggregate("norm_clipping", x), [-1 / 3, 2 / 3])
    np.testing.assert_allclose(combination("norm_clipping", x @ x.T, 0), [1 / 3, 1 / 3, 1 / 45])


# --- liars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e4, 1e9, 1e30])
@pytest.mark.parametrize("direction", [-1, 1])
def test_one_gross_outlier_among_five(size: float, direction: int) -> None:
    x = points(4, 5, d=6)
    x[2] = direction * size * np.array([1, -1, 1, 1, -1, 1])
    benign = np.delete(x, 2, axis=0)
    centre = benign.mean(0)
    radius = np.linalg.norm(benign - centre, axis=1).max()
    assert np.linalg.norm(aggregate("mean", x) - centre) > 100 * radius
    for rule in (*SELECTING, *COORDINATE_RULES):
        assert np.linalg.norm(aggregate(rule, x, 1) - centre) <= radius, rule
    longest = np.linalg.norm(benign, axis=1).max()
    assert np.linalg.norm(aggregate("norm_clipping", x, 1)) <= longest
    v = aggregate("centred_clipping", x, 1)
    assert np.linalg.norm(v) <= CLIPPING_ITERATIONS * 2 * longest
    assert np.linalg.norm(v - centre) <= radius + longest
    farthest = np.linalg.norm(benign - x[0], axis=1).max()
    assert np.linalg.norm(aggregate("self_centred_clipping", x) - x[0]) <= farthest


@pytest.mark.parametrize("size", [1e4, 1e9, 1e30])
def test_an_outlier_does_not_blur_the_others(size: float) -> None:
    """How far away a liar is must not matter to the last digits: it might as well be infinitely far away."""
    x = points(8, 5, d=6)
    far = np.array([1, -1, 1, 1, -1, 1.0])
    unit = far / np.linalg.norm(far)
    x[4] = size * far
    benign = x[:4]
    np.testing.assert_allclose(aggregate("multi_krum", x, 1), benign.mean(0), atol=1e-12)
    z = aggregate("geometric_median", x, 1)  # the liar pulls with one unit vector, whatever its distance
    pulls = (benign - z) / np.linalg.norm(benign - z, axis=1, keepdims=True)
    np.testing.assert_allclose(pulls.sum(0) + unit, 0, atol=1e-4 + 20 / size)
    tau = np.median([np.linalg.norm(b) for b in [*benign, x[4]]])
    expected = (sum(shrink(b, tau) for b in benign) + tau * unit) / 5
    np.testing.assert_allclose(aggregate("norm_clipping", x, 1), expected, atol=1e-9)
    v = np.zeros(6)
    for _ in range(CLIPPING_ITERATIONS):
        tau = np.median([np.linalg.norm(b - v) for b in x])
        v = v + (sum(shrink(b - v, tau) for b in benign) + tau * unit) / 5
    np.testing.assert_allclose(aggregate("centred_clipping", x, 1), v, atol=1e-9 + 20 / size)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("num_byzantine", [1, 2])
def test_the_stated_number_of_clients_bears_the_stated_number_of_liars(rule: str, num_byzantine: int) -> None:
    """At the smallest n: colluding, ever larger liars do not move the result without bound, unless it is the mean."""
    n, condition = min_clients(rule, num_byzantine)
    assert condition
    if rule == "mean":
        n = 20
    if rule == "self_centred_clipping":  # its radius bears half of the others
        n = 2 * num_byzantine + 1
    honest = points(6, n - num_byzantine)
    results = [
        aggregate(rule, np.concatenate([honest, np.full((num_byzantine, 4), size)]), num_byzantine)
        for size in (1e6, 1e8, 1e10)
    ]
    if rule == "mean":
        assert np.linalg.norm(results[2]) > 50 * np.linalg.norm(results[1])
    else:
        np.testing.assert_allclose(results[1:], results[:-1], atol=1e-3)
        assert np.linalg.norm(results[2]) < 6 * np.linalg.norm(honest, axis=1).max()


@pytest.mark.parametrize(
    ("rule", "num_byzantine", "least"),
    [
        ("krum", 1, 5),
        ("multi_krum", 3, 9),
        ("geometric_median", 2, 5),
        ("trimmed_mean", 0, 1),
        ("coordinate_median", 4, 9),
        ("norm_clipping", 3, 10),
        ("centred_clipping", 1, 4),
        ("self_centred_clipping", 0, 1),
    ],
)
def test_least_clients(rule: str, num_byzantine: int, least: int) -> None:
    assert min_clients(rule, num_byzantine)[0] == least
    if rule in COMBINATION_RULES:
        combination(rule, np.eye(least), num_byzantine)
        with pytest.raises(AssertionError, match=f"n = {least - 1}, f = {num_byzantine}"):
            combination(rule, np.eye(least - 1), num_byzantine)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(AssertionError, match="there is no rule"):
        combination("kurm", np.eye(5), 1)
    with pytest.raises(AssertionError, match="not a combination"):
        combination("trimmed_mean", np.eye(5), 1)
    with pytest.raises(AssertionError, match="finite"):
        combination("mean", np.full((5, 5), np.nan), 0)
    with pytest.raises(AssertionError, match="sum to 1"):
        self_centred(np.eye(2), np.ones(2), 0)


# --- bucketing --------------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, n=st.integers(1, 12), size=st.integers(1, 4))
def test_buckets_partition_the_clients(seed: int, n: int, size: int) -> None:
    m = buckets(n, size, np.random.default_rng(seed))
    assert m.shape == (-(-n // size), n)
    np.testing.assert_array_equal((m > 0).sum(0), 1)
    assert sorted((m > 0).sum(1))[1:] == [size] * (len(m) - 1)
    np.testing.assert_allclose(m.sum(1), 1)


def test_buckets_are_random_and_map_back() -> None:
    x, rng = points(7, 10), np.random.default_rng(1)
    m, other = buckets(10, 2, rng), buckets(10, 2, rng)
    assert not np.array_equal((m.T @ m) > 0, (other.T @ other) > 0)
    for rule in COMBINATION_RULES:
        c = combination(rule, m @ (x @ x.T) @ m.T, 1) @ m
        np.testing.assert_allclose(c @ x, aggregate(rule, m @ x, 1), atol=1e-6)

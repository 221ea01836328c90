"""Averaging LoRA factors: the bias of the naive rule, exactness and gauge freedom of the product rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_ray.aggregation.factors import INITIAL_SCALE, average, merge_factors, refactored
from sylva_ray.core.types import ClientState

D_OUT, D_IN = 7, 9


def merge_products(
    anchor_a: np.ndarray, factors: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`refactored` for pairs ``(B_j [d_out, r_j], A_j [r_j, d_in])`` whose ranks may differ."""
    left = np.concatenate([b for b, _ in factors], axis=1).astype(np.float64)
    right = np.concatenate([w * a.astype(np.float64) for w, (_, a) in zip(weights, factors, strict=True)])
    return refactored(anchor_a, left, right)


def clients(count: int, rank: int = 2, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "m.lora_A": rng.normal(size=(rank, D_IN)),
            "m.lora_B": rng.normal(size=(D_OUT, rank)),
            "head.bias": rng.normal(size=3),
        }
        for _ in range(count)
    ]


def product(state: ClientState) -> np.ndarray:
    return state["m.lora_B"] @ state["m.lora_A"]


def mean_product(states: Sequence[ClientState], weights: np.ndarray) -> np.ndarray:
    return np.asarray(sum(w * product(s) for w, s in zip(weights, states, strict=True)))


def test_the_naive_bias_is_the_covariance_of_the_factors() -> None:
    states, w = clients(5, rank=3), np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    mean = merge_factors(states[0], states, w, "naive")
    covariance = sum(
        x * (s["m.lora_B"] - mean["m.lora_B"]) @ (s["m.lora_A"] - mean["m.lora_A"])
        for x, s in zip(w, states, strict=True)
    )
    np.testing.assert_allclose(mean_product(states, w) - product(mean), covariance, atol=1e-10)
    assert np.linalg.norm(covariance) > 0.3 * np.linalg.norm(mean_product(states, w))


def test_two_signs_of_one_model_are_that_model() -> None:
    (state,) = clients(1)
    flipped = state | {"m.lora_A": -state["m.lora_A"], "m.lora_B": -state["m.lora_B"]}
    half = [0.5, 0.5]
    np.testing.assert_allclose(product(merge_factors(state, [state, flipped], half, "naive")), 0, atol=1e-12)
    np.testing.assert_allclose(
        product(merge_factors(state, [state, flipped], half, "product_svd")), product(state), atol=1e-12
    )


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 4), rank=st.integers(1, 4), seed=st.integers(0, 999))
def test_product_rule_is_the_best_rank_r(count: int, rank: int, seed: int) -> None:
    states = clients(count, rank, seed)
    w = np.random.default_rng(seed).dirichlet(np.ones(count))
    merged = merge_factors(states[0], states, w, "product_svd")
    target = mean_product(states, w)
    tail = np.linalg.svd(target, compute_uv=False)[rank:]
    np.testing.assert_allclose(np.linalg.norm(target - product(merged)), np.linalg.norm(tail), atol=1e-9)
    np.testing.assert_allclose(merged["head.bias"], sum(x * s["head.bias"] for x, s in zip(w, states, strict=True)))


def test_rank_enough_for_all_is_exact() -> None:
    states, w = clients(3, rank=2), np.full(3, 1 / 3)
    factors = [(s["m.lora_B"], s["m.lora_A"]) for s in states]
    b, a = merge_products(np.random.default_rng(1).normal(size=(6, D_IN)), factors, w)
    np.testing.assert_allclose(b @ a, mean_product(states, w), atol=1e-12)


def test_gauge_changes_the_naive_mean_and_not_the_product() -> None:
    states, w = clients(3), np.array([0.2, 0.5, 0.3])
    r = np.array([[2.0, 1.0], [0.5, -1.0]])
    gauged = [
        states[0],
        states[1] | {"m.lora_B": states[1]["m.lora_B"] @ r, "m.lora_A": np.linalg.inv(r) @ states[1]["m.lora_A"]},
        states[2],
    ]
    exact = [product(merge_factors(states[0], s, w, "product_svd")) for s in (states, gauged)]
    naive = [product(merge_factors(states[0], s, w, "naive")) for s in (states, gauged)]
    np.testing.assert_allclose(exact[0], exact[1], atol=1e-10)
    assert np.abs(naive[0] - naive[1]).max() > 0.1


def test_rows_of_a_keep_their_initial_scale() -> None:
    states = clients(3)
    merged = merge_factors(states[0], states, np.full(3, 1 / 3), "product_svd")
    np.testing.assert_allclose(np.linalg.norm(merged["m.lora_A"], axis=1), 1 / INITIAL_SCALE)


def test_the_free_sign_of_the_svd_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits from a LAPACK that returns every eigenvector and singular pair with the other sign."""
    states, w = clients(3), np.full(3, 1 / 3)
    ours = merge_factors(states[0], states, w, "product_svd")
    svd, eigh = np.linalg.svd, np.linalg.eigh

    def flipped_svd(matrix: np.ndarray, full_matrices: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, s, vt = svd(matrix, full_matrices=full_matrices)
        return -u, s, -vt

    def flipped_eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = eigh(matrix)
        return values, -vectors

    monkeypatch.setattr(np.linalg, "svd", flipped_svd)
    monkeypatch.setattr(np.linalg, "eigh", flipped_eigh)
    theirs = merge_factors(states[0], states, w, "product_svd")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("rule", ["naive", "product_svd"])
def test_identical_clients_are_the_identity_bit_for_bit(rule: str) -> None:
    state = {name: value.astype(np.float32) for name, value in clients(1)[0].items()}
    merged = merge_factors(state, [dict(state) for _ in range(5)], np.array([0.1, 0.2, 0.3, 0.25, 0.15]), rule)
    assert all(np.array_equal(merged[name], state[name]) and merged[name].dtype == np.float32 for name in state)


def test_modules_of_any_shapes_are_merged_each_by_itself() -> None:
    """Modules of equal shapes go through one stack, also where one of them has learnt nothing."""
    states = clients(3)
    for index, state in enumerate(states):
        other = clients(3, seed=7)[index]
        state["n.lora_A"], state["n.lora_B"] = other["m.lora_A"], other["m.lora_B"]
        state["silent.lora_A"], state["silent.lora_B"] = other["m.lora_A"], np.zeros((D_OUT, 2))
        wide = np.random.default_rng(index)
        state["wide.lora_A"], state["wide.lora_B"] = wide.normal(size=(2, 5)), wide.normal(size=(20, 2))
    w = np.array([0.2, 0.5, 0.3])
    together = merge_factors(states[0], states, w, "product_svd")
    for module in ("m", "n", "silent", "wide"):
        own = [{name: value for name, value in state.items() if name.startswith(f"{module}.")} for state in states]
        alone = merge_factors(own[0], own, w, "product_svd")
        for name, value in alone.items():
            np.testing.assert_allclose(together[name], value, atol=1e-12)
    assert np.array_equal(together["silent.lora_A"], states[0]["silent.lora_A"])


def test_the_size_of_a_stack_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    states, w = clients(3), np.full(3, 1 / 3)
    for index, state in enumerate(states):
        state["n.lora_A"], state["n.lora_B"] = clients(3, seed=7)[index]["m.lora_A"], state["m.lora_B"]
    together = merge_factors(states[0], states, w, "product_svd")
    monkeypatch.setattr("sylva_ray.aggregation.factors.STACK_SIZE", 1)
    apart = merge_factors(states[0], states, w, "product_svd")
    for name, value in together.items():
        np.testing.assert_allclose(apart[name], value, atol=1e-12)


def test_who_has_no_weight_is_not_heard() -> None:
    states = clients(3)
    merged = merge_factors(states[0], states, [0.4, 0, 0.6], "product_svd")
    alone = merge_factors(states[0], states[::2], [0.4, 0.6], "product_svd")
    assert all(np.array_equal(merged[name], alone[name]) for name in merged)


def test_silent_directions_keep_the_old_rows_of_a() -> None:
    """Nothing was learnt (B = 0) or only one direction was: the rest can still learn, because its A is not 0."""
    states = clients(2)
    silent = [s | {"m.lora_B": np.zeros((D_OUT, 2))} for s in states]
    merged = merge_factors(silent[0], silent, [0.5, 0.5], "product_svd")
    assert np.array_equal(merged["m.lora_A"], silent[0]["m.lora_A"])
    assert not merged["m.lora_B"].any()
    one = [
        s | {"m.lora_B": np.outer(np.arange(D_OUT), [1.0, 0.0]), "m.lora_A": states[0]["m.lora_A"] * k}
        for k, s in ((1, states[0]), (2, states[1]))
    ]
    merged = merge_factors(one[0], one, [0.5, 0.5], "product_svd")
    np.testing.assert_allclose(product(merged), mean_product(one, np.array([0.5, 0.5])), atol=1e-12)
    assert np.array_equal(merged["m.lora_A"][1], one[0]["m.lora_A"][1])
    assert not merged["m.lora_B"][:, 1].any()


def test_order_and_repetition_of_clients() -> None:
    states, w = clients(3), np.array([0.2, 0.5, 0.3])
    forward = merge_factors(states[0], states, w, "product_svd")
    backward = merge_factors(states[0], states[::-1], w[::-1], "product_svd")
    np.testing.assert_allclose(product(forward), product(backward), atol=1e-12)
    twice = merge_factors(states[0], [*states, states[1]], [0.2, 0.3, 0.3, 0.2], "product_svd")
    np.testing.assert_allclose(product(forward), product(twice), atol=1e-12)
    again = merge_factors(states[0], states, w, "product_svd")
    assert all(np.array_equal(forward[n], again[n]) for n in forward)


def test_average_by_hand() -> None:
    anchor, other = {"x": np.array([1, 2], np.float32)}, {"x": np.array([3, 6], np.float32)}
    merged = average(anchor, [anchor, other], [0.75, 0.25])
    assert merged["x"].tolist() == [1.5, 3.0]
    assert merged["x"].dtype == np.float32


@pytest.mark.parametrize("weights", [[0.5, 0.6], [np.nan, 1.0]])
def test_weights_that_are_no_mean_are_our_bug(weights: np.ndarray) -> None:
    states = clients(2)
    with pytest.raises(AssertionError):
        merge_factors(states[0], states, weights, "product_svd")
    with pytest.raises(AssertionError):
        average(states[0], states, weights)

"""The neighbour graph: gauge-free geometry, the ball tree against brute force, weights that sum to one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_ray.aggregation.neighbours import NeighbourGraph, global_graph, neighbour_graph, product_gram
from tests.aggregation.test_factors import clients, product


def random_gram(seed: int, size: int = 20) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(size, 8))
    return points @ points.T


@pytest.mark.parametrize("rows", [1, 6, 7, 128])
def test_gram_is_that_of_the_dense_updates(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes through a matrix product together."""
    monkeypatch.setattr("sylva_ray.aggregation.neighbours.GRAM_ROWS", rows)
    states = clients(5, rank=3)
    dense = np.array([product(s).ravel() for s in states])
    np.testing.assert_allclose(product_gram(states), dense @ dense.T, rtol=1e-12)


@pytest.mark.parametrize("seed", range(50))
def test_ball_tree_finds_what_brute_force_finds(seed: int) -> None:
    gram = random_gram(seed)
    norms = np.sqrt(np.diag(gram))
    distance = 2 - 2 * gram / norms[:, None] / norms
    expected = np.sort(np.argsort(distance, axis=1, kind="stable")[:, :5], axis=1)
    assert np.array_equal(neighbour_graph(gram, np.ones(20), k=5).members, expected)


def test_two_clusters_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    centre = np.repeat(np.eye(2) * 10, 6, axis=0)
    points = np.hstack([centre, rng.normal(size=(12, 4))])
    graph = neighbour_graph(points @ points.T, np.ones(12), k=6)
    assert (graph.members[:6] < 6).all()
    assert (graph.members[6:] >= 6).all()


@pytest.mark.parametrize("seed", range(5))
def test_rows_sum_to_one_and_oneself_weighs_at_least_one_in_k(seed: int) -> None:
    samples = np.random.default_rng(seed).integers(1, 1000, 20)
    graph = neighbour_graph(random_gram(seed), samples)
    assert graph.members.shape == (20, 5)
    dense = graph.matrix()
    np.testing.assert_allclose(dense.sum(1), 1)
    assert (np.diag(dense) >= 1 / 5 - 1e-12).all()
    assert all(np.array_equal(row, np.sort(row)) and i in row for i, row in enumerate(graph.members))


@pytest.mark.parametrize("apart", [np.pi / 3, np.pi / 5])
def test_weights_by_hand(apart: float) -> None:
    """Three clients on a circle: sigma is the chord to the farthest, and lengths do not matter."""
    angles = np.array([0.0, apart, 2 * apart])
    points = np.array([[1.0], [2.0], [3.0]]) * np.stack([np.cos(angles), np.sin(angles)], -1)
    near, far = 2 * np.sin(apart / 2), 2 * np.sin(apart)  # chords of the unit circle
    expected = np.array([50.0, 7 * np.exp(-(near**2) / (2 * far**2)), 11 * np.exp(-1 / 2)])
    graph = neighbour_graph(points @ points.T, np.array([50, 7, 11]), k=3)
    np.testing.assert_allclose(graph.weights[0], expected / expected.sum())


def test_the_floor_leaves_the_others_their_proportions() -> None:
    free, floored = (
        neighbour_graph(random_gram(1, 3), np.array([own, 1000, 2000]), k=3).weights[0] for own in (10_000, 1)
    )
    assert free[0] > 1 / 3
    assert floored[0] == pytest.approx(1 / 3)
    assert floored[1] / floored[2] == pytest.approx(free[1] / free[2])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 12))
def test_renumbering_the_clients_renumbers_the_graph(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    gram, samples, order = random_gram(seed, size), rng.integers(1, 100, size), rng.permutation(size)
    before = neighbour_graph(gram, samples).matrix()
    after = neighbour_graph(gram[np.ix_(order, order)], samples[order]).matrix()
    np.testing.assert_allclose(after, before[np.ix_(order, order)], atol=1e-7)


def test_gauge_does_not_move_neighbours() -> None:
    states = clients(8)
    r = np.array([[3.0, 1.0], [0.2, -0.5]])
    gauged = [s | {"m.lora_B": s["m.lora_B"] @ r, "m.lora_A": np.linalg.inv(r) @ s["m.lora_A"]} for s in states]
    a, b = (neighbour_graph(product_gram(s), np.ones(8)) for s in (states, gauged))
    assert np.array_equal(a.members, b.members)
    np.testing.assert_allclose(a.weights, b.weights, atol=1e-8)


def test_a_global_graph_is_fedavg() -> None:
    np.testing.assert_allclose(global_graph(np.array([1, 2, 3, 4])).matrix(), np.tile([0.1, 0.2, 0.3, 0.4], (4, 1)))


def test_identical_or_silent_clients_yield_no_nan_and_lowest_numbers_first() -> None:
    for gram in (np.zeros((6, 6)), np.ones((6, 6))):
        graph = neighbour_graph(gram, np.ones(6), k=3)
        assert np.isfinite(graph.weights).all()
        assert graph.members[0].tolist() == [0, 1, 2]
        assert graph.members[5].tolist() == [0, 1, 5]


def test_alike_are_rows_with_the_same_members_weights_and_own_parts() -> None:
    members = np.array([[0, 1], [0, 1], [0, 2], [0, 1], [0, 1]])
    weights = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.4, 0.6], [0.5, 0.5]])
    graph = NeighbourGraph(members, weights)
    assert graph.group_receivers([None] * 5) == [[0, 1, 4], [2], [3]]
    assert graph.group_receivers(["a", "b", "a", "a", "a"]) == [[0, 4], [1], [2], [3]]
    assert global_graph(np.array([1, 2, 3])).group_receivers([None] * 3) == [[0, 1, 2]]


def test_one_client_is_its_own_neighbour() -> None:
    graph = neighbour_graph(np.array([[2.0]]), np.array([7]))
    assert graph.members.tolist() == [[0]]
    assert graph.weights.tolist() == [[1.0]]

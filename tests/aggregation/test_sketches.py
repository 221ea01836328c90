"""Neighbours in large fleets: exact products of listed pairs, how many neighbours the sketches miss, silent clients."""

from __future__ import annotations

import numpy as np
import pytest

from sylva_ray.aggregation.neighbours import nearest_clients, neighbour_graph, product_gram
from sylva_ray.aggregation.sketches import candidate_lists, listed_products, update_norms
from tests.aggregation.test_factors import clients


def groups_of_clients(size: int, num_groups: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Draw clients whose updates differ by group, more or less far from its centre."""
    rng = np.random.default_rng(seed)
    shapes = {f"{module}.lora_{f}": s for module in "mn" for f, s in (("A", (4, 40)), ("B", (50, 4)))}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    centres = [{name: 0.3 * rng.normal(size=s) for name, s in shapes.items()} for _ in range(num_groups)]
    fleet = []
    for client in range(size):
        spread = rng.uniform(0.02, 0.2)
        moved = {n: start[n] + centres[client % num_groups][n] + spread * rng.normal(size=s) for n, s in shapes.items()}
        fleet.append({name: value.astype(np.float32) for name, value in moved.items()})
    return fleet


@pytest.mark.parametrize("partners", [1, 3, 64])
def test_listed_products_and_norms_are_those_of_the_gram_matrix(monkeypatch: pytest.MonkeyPatch, partners: int) -> None:
    """However many clients are multiplied with one at a time."""
    monkeypatch.setattr("sylva_ray.aggregation.sketches.PARTNERS", partners)
    states, rng = clients(9, rank=3), np.random.default_rng(0)
    lists = np.sort(np.stack([rng.choice(9, 4, replace=False) for _ in range(9)]), axis=1)
    gram = product_gram(states)
    np.testing.assert_allclose(listed_products(states, lists), np.take_along_axis(gram, lists, axis=1), rtol=1e-5)
    np.testing.assert_allclose(update_norms(states), np.sqrt(np.diag(gram)), rtol=1e-10)


def test_sketches_find_the_neighbours_of_a_large_fleet() -> None:
    states, samples = groups_of_clients(400, 12), np.random.default_rng(1).integers(1, 100, 400)
    found, exact = nearest_clients(states, samples), neighbour_graph(product_gram(states), samples)
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found.members, exact.members, strict=True)]
    assert np.mean(hits) / exact.members.shape[1] > 0.98
    assert min(hits) / exact.members.shape[1] > 0.8
    np.testing.assert_allclose(found.weights.sum(1), 1)


def test_with_all_clients_as_candidates_the_graph_is_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sylva_ray.aggregation.neighbours.MAX_GRAM_CLIENTS", 10)
    monkeypatch.setattr("sylva_ray.aggregation.neighbours.num_candidates", lambda _: 40)
    states, samples = groups_of_clients(40, 3), np.arange(1, 41)
    found, exact = nearest_clients(states, samples), neighbour_graph(product_gram(states), samples)
    assert np.array_equal(found.members, exact.members)
    np.testing.assert_allclose(found.weights, exact.weights, rtol=1e-4)


def test_candidates_contain_the_client_itself_in_ascending_order() -> None:
    states = groups_of_clients(30, 3)
    lists = candidate_lists(states, update_norms(states), 5)
    assert lists.shape == (30, 5)
    assert (np.diff(lists, axis=1) > 0).all()
    assert all(client in row for client, row in enumerate(lists))


@pytest.mark.parametrize("num_picked", [0, 3, 25, 40])
def test_clients_that_were_never_picked_are_neighbours_of_each_other(
    num_picked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their B is zero: they come as the Gram matrix has them, the lowest numbers first."""
    states, samples = groups_of_clients(40, 3), np.arange(1, 41)
    picked = np.random.default_rng(2).permutation(40)[:num_picked]
    for client in set(range(40)) - set(picked.tolist()):
        states[client] = {n: v if n.endswith("A") else np.zeros_like(v) for n, v in states[client].items()}
    exact = neighbour_graph(product_gram(states), samples)
    monkeypatch.setattr("sylva_ray.aggregation.neighbours.MAX_GRAM_CLIENTS", 10)
    monkeypatch.setattr("sylva_ray.aggregation.neighbours.num_candidates", lambda _: 40)
    found = nearest_clients(states, samples)
    assert np.array_equal(found.members, exact.members)
    np.testing.assert_allclose(found.weights, exact.weights, rtol=1e-4)
    silent = [client for client in range(40) if client not in picked]
    if len(silent) >= 7:
        for client in silent:
            assert set(found.members[client]) <= set(silent)


def test_of_equal_clients_the_lowest_numbers_are_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rounding in single precision tells them apart: the same updates in other coordinates."""
    monkeypatch.setattr("sylva_ray.aggregation.neighbours.MAX_GRAM_CLIENTS", 5)
    states = groups_of_clients(30, 3)
    rng = np.random.default_rng(0)
    for client in range(20, 30):
        for module in "mn":
            turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
            states[client][f"{module}.lora_A"] = (turn.T @ states[20][f"{module}.lora_A"]).astype(np.float32)
            states[client][f"{module}.lora_B"] = (states[20][f"{module}.lora_B"] @ turn).astype(np.float32)
    members = nearest_clients(states, np.ones(30), k=4).members
    assert members[20:24].tolist() == [[20, 21, 22, 23]] * 4
    assert members[29].tolist() == [20, 21, 22, 29]

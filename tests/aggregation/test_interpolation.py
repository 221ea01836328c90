"""Between two states: products are interpolated, ranks and other parameters stay."""

from __future__ import annotations

import numpy as np
import pytest

from sylva_ray.aggregation.interpolation import interpolate

NAMES = ["m.lora_A", "m.lora_B", "head.weight"]


def pair(seed: int, rank: int = 4, slots: int = 4) -> dict[str, np.ndarray]:
    """A state with one adapted layer, a head, and a layer that is not refined."""
    rng = np.random.default_rng(seed)
    a, b = np.zeros((slots, 12), np.float32), np.zeros((9, slots), np.float32)
    a[:rank], b[:, :rank] = rng.normal(size=(rank, 12)), rng.normal(size=(9, rank))
    return {"m.lora_A": a, "m.lora_B": b, "head.weight": rng.normal(size=(3, 9)).astype(np.float32), "o": a.copy()}


def product(state: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(state["m.lora_B"] @ state["m.lora_A"])


def nearest(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * sigma[:rank]) @ vt[:rank])


@pytest.mark.parametrize("rank", [4, 2])
def test_it_is_the_nearest_product_of_the_clients_rank(rank: int) -> None:
    """With a rank below the number of slots, as hetlora_at has it, the other slots stay zero."""
    robust, refined = pair(0, rank), pair(1, rank)
    between = dict(interpolate(robust, refined, NAMES, 0.25))
    expected = nearest(0.75 * product(robust) + 0.25 * product(refined), rank)
    np.testing.assert_allclose(product(between), expected, atol=1e-5)
    assert not between["m.lora_A"][rank:].any()
    assert not between["m.lora_B"][:, rank:].any()
    head = 0.75 * robust["head.weight"] + 0.25 * refined["head.weight"]
    np.testing.assert_allclose(between["head.weight"], head, atol=1e-6)
    assert between["o"] is robust["o"]


@pytest.mark.parametrize("alone", ["m.lora_A", "m.lora_B"])
def test_a_factor_alone_is_interpolated_exactly(alone: str) -> None:
    robust = pair(0)
    refined = robust | {alone: pair(1)[alone]}
    between = interpolate(robust, refined, [alone], 0.5)
    np.testing.assert_allclose(between[alone], (robust[alone] + refined[alone]) / 2, rtol=1e-6)
    assert all(between[name] is robust[name] for name in robust if name != alone)


@pytest.mark.parametrize("share", [0, 1])
def test_the_ends_have_the_bits_of_the_states(share: int) -> None:
    robust, refined = pair(0), pair(1)
    between = interpolate(robust, refined, NAMES, share)
    assert all(between[name] is (robust, refined)[share][name] for name in NAMES)
    assert between["o"] is robust["o"]

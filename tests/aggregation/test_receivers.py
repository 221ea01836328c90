"""Merges for many receivers: as good as each by itself, and the same bits whoever else is merged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sylva_ray.aggregation.factors import merge_factors
from sylva_ray.aggregation.low_rank import SINGLE_ERROR
from sylva_ray.aggregation.receivers import Mixture, leading_of_mixtures, long_modules, merge_for_receivers, pack
from sylva_ray.aggregation.threads import in_threads, in_turn

State = dict[str, np.ndarray]
CLIENTS, RANK, WIDTHS = 40, 4, {"m": (70, 60), "n": (40, 90)}  # module: d_out, d_in
NAMES = [f"{module}.lora_{letter}" for module in WIDTHS for letter in "AB"]


def fleet(spread: float = 0.03, rotated: bool = False) -> list[State]:
    """Clients that have moved away from a common state; rotated: each factorises its update in its own way."""
    rng = np.random.default_rng(0)
    states: list[State] = [{"bias": rng.normal(size=3).astype(np.float32)} for _ in range(CLIENTS)]
    for module, (d_out, d_in) in WIDTHS.items():
        a = np.linalg.qr(rng.normal(size=(d_in, RANK)))[0].T
        b = np.linalg.qr(rng.normal(size=(d_out, RANK)))[0] * np.linspace(1, 0.3, RANK)
        for state in states:
            own_a, own_b = (factor + spread * rng.normal(size=factor.shape) for factor in (a, b))
            turn = np.linalg.qr(rng.normal(size=(RANK, RANK)))[0] if rotated else np.eye(RANK)
            state[f"{module}.lora_A"] = (turn.T @ own_a).astype(np.float32)
            state[f"{module}.lora_B"] = (own_b @ turn).astype(np.float32)
    return states


def slow_fleet(seed: int) -> list[State]:
    """Clients that have moved by very different amounts: some receivers' spectra fall fast, others slowly."""
    rng = np.random.default_rng(seed)
    states: list[State] = [{} for _ in range(CLIENTS)]
    moves = 0.5 * np.exp(rng.normal(size=CLIENTS))
    for module, (d_out, d_in) in WIDTHS.items():
        a, b = rng.normal(size=(RANK, d_in)), rng.normal(size=(d_out, RANK))
        for state, move in zip(states, moves, strict=True):
            for letter, factor in (("A", a), ("B", b)):
                noisy = factor + move * rng.normal(size=factor.shape)
                state[f"{module}.lora_{letter}"] = noisy.astype(np.float32)
    return states


def mixtures(size: int = 32, count: int = 11) -> list[Mixture]:
    rng = np.random.default_rng(1)
    members = [np.sort(rng.choice(CLIENTS, size, replace=False)) for _ in range(count)]
    return [Mixture(chosen, rng.dirichlet(np.full(size, 5.0)), int(chosen[0])) for chosen in members]


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def product(state: State, module: str) -> np.ndarray:
    return np.asarray(state[f"{module}.lora_B"].astype(np.float64) @ state[f"{module}.lora_A"])


def assert_best(states: list[State], mixture: Mixture, merged: State) -> None:
    for module in WIDTHS:
        parts = zip(mixture.members, mixture.weights, strict=True)
        u, s, vt = np.linalg.svd(sum(w * product(states[j], module) for j, w in parts), full_matrices=False)
        best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        assert np.linalg.norm(product(merged, module) - best) <= SINGLE_ERROR * s[0]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("spread", [1e-4, 0.03])
def test_every_product_is_the_best_of_its_rank(spread: float, rotated: bool) -> None:
    states = fleet(spread, rotated)
    for mixture, merged in zip(mixtures(), merge_for_receivers(states, mixtures(), in_turn), strict=True):
        assert_best(states, mixture, merged)


def test_the_iteration_settles_moved_fleets_and_leaves_unrelated_ones() -> None:
    members, weights = np.stack([m.members for m in mixtures()]), np.stack([m.weights for m in mixtures()])
    assert leading_of_mixtures(pack(fleet(), "m"), members, weights, RANK)[1].all()
    assert not leading_of_mixtures(pack(fleet(spread=3.0), "m"), members, weights, RANK)[1].any()


def test_what_does_not_settle_is_merged_as_one_receiver_is() -> None:
    states = fleet(spread=3.0)
    mixture = mixtures()[0]
    (merged,) = merge_for_receivers(states, [mixture], in_turn)
    members = [states[j] for j in mixture.members]
    alone = merge_factors(states[mixture.receiver], members, mixture.weights, "product_svd")
    for module in WIDTHS:
        np.testing.assert_allclose(product(merged, module), product(alone, module), rtol=0, atol=1e-5)


def test_the_bits_do_not_depend_on_the_other_receivers_or_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    states, wanted = fleet(), mixtures()
    together = merge_for_receivers(states, wanted, in_threads)
    apart = [merge_for_receivers(states, [mixture], in_turn)[0] for mixture in wanted]
    monkeypatch.setattr("sylva_ray.aggregation.receivers.COLUMNS", 3 * CLIENTS * RANK)
    in_threes = merge_for_receivers(states, wanted[::-1], in_turn)[::-1]
    assert all(map(equal, together, apart))
    assert all(map(equal, together, in_threes))


@pytest.mark.parametrize("seed", range(4))
def test_a_receiver_that_is_given_up_alone_is_given_up_beside_others(seed: int) -> None:
    """The others of its batch may take more steps, in which it would settle after all."""
    states, wanted = slow_fleet(seed), mixtures(count=200)
    members, weights = np.stack([m.members for m in wanted]), np.stack([m.weights for m in wanted])
    packed = pack(states, "m")
    together = leading_of_mixtures(packed, members, weights, RANK)[1]
    apart = [leading_of_mixtures(packed, members[[i]], weights[[i]], RANK)[1][0] for i in range(len(wanted))]
    assert 0 < together.sum() < len(wanted)
    assert together.tolist() == apart


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_client_with_broken_factors_spoils_only_the_merges_that_hear_it(value: float) -> None:
    states = fleet()
    for name in NAMES:
        states[7][name] = np.full_like(states[7][name], value)
    deaf = [mixture for mixture in mixtures(count=40) if 7 not in mixture.members]
    assert deaf
    weights = np.where(np.arange(CLIENTS) == 7, 0, 1 / (CLIENTS - 1))
    without = Mixture(np.arange(CLIENTS), weights, 0)
    for mixture in deaf:
        assert_best(states, mixture, merge_for_receivers(states, [mixture], in_turn)[0])
    merged = merge_for_receivers(states, [without, *deaf], in_turn)[0]
    assert all(np.isfinite(merged[name]).all() for name in NAMES)


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_the_scale_does_not_matter(size: float) -> None:
    states = [{n: (size * v).astype(np.float32) if n.endswith("B") else v for n, v in s.items()} for s in fleet()]
    merged = merge_for_receivers(states, mixtures(count=2), in_turn)
    for mixture, result in zip(mixtures(count=2), merged, strict=True):
        assert_best(states, mixture, result)


def test_equal_clients_are_merged_to_themselves_bit_for_bit() -> None:
    states = [fleet()[0]] * CLIENTS
    (merged,) = merge_for_receivers(states, mixtures(count=1), in_turn)
    assert equal(merged, states[0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state, ["m", "n"]),
        (lambda state: {n: v.astype(np.float64) for n, v in state.items()}, []),
        (lambda state: {n: v[:20] if n == "m.lora_B" else v for n, v in state.items()}, ["n"]),
        (lambda state: {n: v for n, v in state.items() if n != "n.lora_B"}, ["m"]),
    ],
)
def test_which_modules_are_merged_together(change: Callable[[State], State], expected: list[str]) -> None:
    state = change(fleet()[0])
    assert long_modules(state, 32) == expected
    assert long_modules(state, 31) == []

"""What malicious clients upload, and which rules tolerate it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_ray.aggregation.robust import (
    COMBINATION_RULES,
    COORDINATE_RULES,
    combination,
    coordinate_median,
    self_centred,
    trimmed_mean,
)
from sylva_ray.attacks.byzantine import BYZANTINE_ATTACKS, ByzantineAttack, alie_z, flip_labels
from sylva_ray.config.experiment import ByzantineSection
from sylva_ray.core.types import ClientState
from sylva_ray.transport.byzantine import draw_byzantine_clients, malicious_update

N, NUM_BYZANTINE = 13, 3


def honest_updates(seed: int = 0, count: int = N, spread: float = 0.25) -> list[dict[str, np.ndarray]]:
    """All in about the same direction: a common update of 1 or -1 in every coordinate, plus ``spread``."""
    rng = np.random.default_rng(seed)
    shapes = {"blocks.0.lora_B": (6, 4), "head.bias": (5,)}
    common = {name: rng.choice([-1.0, 1.0], size=shape) for name, shape in shapes.items()}
    return [
        {name: (common[name] + spread * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def attack_update(
    attack: str,
    seed: int = 0,
    strength: float | None = None,
    own: ClientState | None = None,
    benign: Sequence[ClientState] | None = None,
    num_clients: int = N,
    num_byzantine: int = NUM_BYZANTINE,
) -> dict[str, np.ndarray]:
    updates = honest_updates(seed)
    own, benign = own or updates[-1], updates[:-NUM_BYZANTINE] if benign is None else benign
    return malicious_update(attack, own, benign, np.random.default_rng(seed), num_clients, num_byzantine, strength)


def flat(update: ClientState) -> np.ndarray:
    return np.concatenate([np.asarray(value, float).ravel() for value in update.values()])


@pytest.mark.parametrize("attack", BYZANTINE_ATTACKS)
def test_a_malicious_update_looks_like_an_update(attack: str) -> None:
    updates = honest_updates()
    before = [flat(update) for update in updates]
    result = attack_update(attack, own=updates[-1], benign=updates[:-NUM_BYZANTINE])
    assert list(result) == list(updates[-1])
    for name, value in result.items():
        assert (value.shape, value.dtype) == (updates[-1][name].shape, np.dtype(np.float32))
        assert not any(np.shares_memory(value, update[name]) for update in updates)
        assert np.isfinite(value).all() == (attack != "nan")
    np.testing.assert_array_equal(before, [flat(update) for update in updates])
    with pytest.raises(AssertionError, match="there is no attack"):
        attack_update(attack + "s")


def test_the_settings_name_every_attack() -> None:
    assert get_args(ByzantineSection.model_fields["attack"].annotation) == tuple(BYZANTINE_ATTACKS)


@pytest.mark.parametrize(("name", "attack"), BYZANTINE_ATTACKS.items())
def test_a_strength_is_refused_where_it_has_no_effect(name: str, attack: ByzantineAttack) -> None:
    same = np.array_equal(flat(attack_update(name)), flat(attack_update(name, strength=7.0)), equal_nan=True)
    assert same != attack.takes_strength
    if same:
        with pytest.raises(ValueError, match="has no effect on"):
            ByzantineSection(attack=name, strength=7.0)


def test_known_lies() -> None:
    own, benign = {"w": np.array([4.0, -2.0])}, [{"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, 8.0])}]

    def told(attack: str, strength: float | None = None) -> Any:
        return attack_update(attack, own=own, benign=benign, strength=strength)["w"].tolist()

    assert told("sign_flip") == [-4, 2]
    assert told("sign_flip", 2.5) == [-10, 5]
    assert told("label_flip") == [4, -2]
    assert told("alie") == [1, 2]  # mean (2, 5), standard deviations (1, 3), z = 1
    assert told("alie", 2.0) == [0, -1]
    assert told("ipm") == [-4, -10]
    assert told("ipm", 0.1) == pytest.approx([-0.2, -0.5])
    assert told("mimic") == [1, 2]
    assert np.isnan(told("nan")).all()


@pytest.mark.parametrize(("strength", "factor"), [(None, 10), (2.0, 2)])
def test_gaussian_noise_is_ten_times_the_honest_spread_of_each_array(strength: float | None, factor: int) -> None:
    rng = np.random.default_rng(2)
    benign = [{"a": rng.normal(0, 3, (50, 50)), "b": rng.normal(7, 0.1, 2000)} for _ in range(4)]
    result = attack_update("gaussian", own=benign[0], benign=benign, strength=strength)
    assert result["a"].std() == pytest.approx(factor * 3, rel=0.1)
    assert result["b"].std() == pytest.approx(factor * 0.1, rel=0.1)
    assert abs(result["b"].mean()) < 7  # around zero, not around the honest mean


def test_only_noise_is_random() -> None:
    updates = honest_updates()
    for attack in BYZANTINE_ATTACKS:
        first, second = (
            flat(malicious_update(attack, updates[-1], updates[:-1], np.random.default_rng(seed), N, 1))
            for seed in (0, 1)
        )
        assert np.array_equal(first, second, equal_nan=True) == (attack != "gaussian")


def test_who_colludes_sends_the_same() -> None:
    updates = honest_updates()
    for attack in ("alie", "ipm", "mimic"):
        first, second = (flat(attack_update(attack, own=own)) for own in updates[-2:])
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(flat(attack_update("mimic")), flat(updates[0]))


@pytest.mark.parametrize("attack", BYZANTINE_ATTACKS)
def test_an_attack_without_honest_clients(attack: str) -> None:
    own = {"w": np.array([4.0, -2.0])}
    result = attack_update(attack, own=own, benign=[], num_clients=2, num_byzantine=2)["w"]
    assert np.isfinite(result).all() == (attack != "nan")


def test_alie_z() -> None:
    assert alie_z(50, 24) == pytest.approx(1.426, abs=1e-3)
    assert alie_z(10, 2) == 1  # the formula says 0
    assert alie_z(20, 4) == 1  # the formula says 0.157
    for n in range(1, 12):  # also where attackers are everybody or need nobody
        assert all(1 <= alie_z(n, bad) < 10 for bad in range(n + 1))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_alie_hides_among_the_honest(seed: int) -> None:
    """At z = 1 a malicious client is as far from the honest mean as the honest are in the mean square."""
    x = np.array([flat(update) for update in honest_updates(seed)[:-NUM_BYZANTINE]])
    distances = np.linalg.norm(x - x.mean(0), axis=1)
    distance = np.linalg.norm(flat(attack_update("alie", seed)) - x.mean(0))
    assert distance == pytest.approx(np.sqrt((distances**2).mean()), rel=1e-5)


@pytest.mark.parametrize("strength", [0.1, 2.0, 3.3, 3.4, 5.0])
def test_inner_product_manipulation_turns_the_mean_around(strength: float) -> None:
    """Iff eps f > n - f; here 10/3."""
    x = np.array([flat(update) for update in honest_updates()[:-NUM_BYZANTINE]])
    everything = np.concatenate([x, np.tile(flat(attack_update("ipm", strength=strength)), (NUM_BYZANTINE, 1))])
    assert (everything.mean(0) @ x.mean(0) < 0) == (strength > (N - NUM_BYZANTINE) / NUM_BYZANTINE)


def test_flipped_labels() -> None:
    np.testing.assert_array_equal(flip_labels(np.array([0, 1, 9, 4]), 10), [9, 8, 0, 5])
    labels = np.random.default_rng(0).integers(0, 7, 100)
    np.testing.assert_array_equal(flip_labels(flip_labels(labels, 7), 7), labels)
    assert flip_labels(labels, 7).dtype == labels.dtype


@settings(max_examples=60, deadline=None)
@given(percent=st.integers(0, 100), hundreds=st.integers(1, 3), seed=st.integers(0, 99))
def test_attackers_are_distinct_and_as_many_as_said(percent: int, hundreds: int, seed: int) -> None:
    chosen = draw_byzantine_clients(percent / 100, 100 * hundreds, np.random.default_rng(seed))
    assert len(set(chosen)) == len(chosen) == percent * hundreds
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(100 * hundreds))
    assert all(type(client) is int for client in chosen)


def test_attackers_are_rounded_down_and_drawn() -> None:
    assert len(draw_byzantine_clients(0.3, 9, np.random.default_rng(0))) == 2
    draws = {tuple(draw_byzantine_clients(0.3, 20, np.random.default_rng(seed))) for seed in range(5)}
    assert len(draws) > 1
    assert draw_byzantine_clients(0.3, 20, np.random.default_rng(3)) == draw_byzantine_clients(
        0.3, 20, np.random.default_rng(3)
    )


# --- rules against attacks --------------------------------------------------------------------------------------------


def everyone_sends(attack: str, seed: int, strength: float | None = None) -> np.ndarray:
    """``[N, d]``: honest clients first, then the malicious ones."""
    updates = honest_updates(seed)
    rng = np.random.default_rng(seed)
    malicious = [
        malicious_update(attack, own, updates[:-NUM_BYZANTINE], rng, N, NUM_BYZANTINE, strength)
        for own in updates[-NUM_BYZANTINE:]
    ]
    return np.array([flat(update) for update in updates[:-NUM_BYZANTINE] + malicious])


def aggregate(rule: str, x: np.ndarray) -> np.ndarray:
    if rule == "coordinate_median":
        return coordinate_median(x)
    if rule == "trimmed_mean":
        return trimmed_mean(x, NUM_BYZANTINE)
    if rule == "self_centred_clipping":
        return np.asarray(self_centred(x @ x.T, np.full(N, 1 / N), 0) @ x)
    return np.asarray(combination(rule, x @ x.T, NUM_BYZANTINE) @ x)


ROBUST = [r for r in (*COMBINATION_RULES, *COORDINATE_RULES) if r not in ("mean", "norm_clipping")]


def distance_and_radius(result: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    honest = x[:-NUM_BYZANTINE]
    centre = honest.mean(0)
    return float(np.linalg.norm(result - centre)), float(np.linalg.norm(honest - centre, axis=1).max())


@pytest.mark.parametrize("rule", [*ROBUST, "self_centred_clipping"])
@pytest.mark.parametrize("attack", [a for a in BYZANTINE_ATTACKS if a != "nan"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_a_robust_result_is_among_the_honest(rule: str, attack: str, seed: int) -> None:
    x = everyone_sends(attack, seed)
    distance, radius = distance_and_radius(aggregate(rule, x), x)
    assert distance <= radius * (1 + 1e-9)  # Krum may choose the farthest of the honest


@pytest.mark.parametrize("attack", ["sign_flip", "gaussian", "ipm"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_the_mean_is_not(attack: str, seed: int) -> None:
    x = everyone_sends(attack, seed)
    distance, radius = distance_and_radius(aggregate("mean", x), x)
    assert distance > radius


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_norm_clipping_bounds_lengths_not_directions(seed: int) -> None:
    """It tames noise, which is long; a flipped update is as long as an honest one and passes unclipped."""
    noisy, flipped = everyone_sends("gaussian", seed, 30.0), everyone_sends("sign_flip", seed)
    longest = np.linalg.norm(noisy[:-NUM_BYZANTINE], axis=1).max()
    assert np.linalg.norm(aggregate("norm_clipping", noisy)) <= longest
    assert np.linalg.norm(aggregate("mean", noisy)) > longest
    distance, radius = distance_and_radius(aggregate("norm_clipping", flipped), flipped)
    assert distance > radius


def test_a_mimic_is_borne_but_heard() -> None:
    """Nothing leaves the honest hull, yet the victim counts four times."""
    x = everyone_sends("mimic", 0)
    honest = x[:-NUM_BYZANTINE]
    np.testing.assert_allclose(aggregate("mean", x), (honest.sum(0) + NUM_BYZANTINE * honest[0]) / N)
    assert combination("krum", x @ x.T, NUM_BYZANTINE)[[0, -3, -2, -1]].sum() == 1

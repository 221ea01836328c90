"""Robust rules on client states: LoRA products have no gauge, and nobody moves where a rule has too few uploads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sylva_ray.aggregation.factors import orthonormal_rows
from sylva_ray.aggregation.robust import COMBINATION_RULES, COORDINATE_RULES
from sylva_ray.aggregation.robust_merge import RobustRule, robust_merge, state_gram
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ClientState
from sylva_ray.federation.context import RoundUploads
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.parameters import RobustParameters

ROBUST = [*sorted({*COMBINATION_RULES} - {"mean"}), "self_centred_clipping"]
HEADS = ("head.weight", "head.bias")


def state(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"m.lora_A": (2, 6), "m.lora_B": (5, 2), "n.lora_A": (2, 4), "n.lora_B": (3, 2), "head.weight": (3, 4)}
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def close(seed: int, centre: dict[str, np.ndarray], by: float = 0.05) -> dict[str, np.ndarray]:
    return {name: centre[name] + value for name, value in state(seed, by).items()}


def products(own: dict[str, np.ndarray]) -> np.ndarray:
    """Everything that a state does: B A of both modules, and the head."""
    parts = [own[f"{m}.lora_B"].astype(float) @ own[f"{m}.lora_A"] for m in "mn"]
    return np.concatenate([part.ravel() for part in (*parts, own["head.weight"].astype(float))])


def regauged(own: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """(B R, R^-1 A): another pair of factors of the same model."""
    rng, changed = np.random.default_rng(seed), dict(own)
    for module in "mn":
        r = rng.normal(size=(2, 2)) + 2 * np.eye(2)
        changed[f"{module}.lora_B"] = own[f"{module}.lora_B"].astype(float) @ r
        changed[f"{module}.lora_A"] = np.linalg.inv(r) @ own[f"{module}.lora_A"].astype(float)
    return changed


def merge(
    rule: str, origin: ClientState, states: Sequence[ClientState], num_byzantine: int = 1, own: int = 0, **extra: Any
) -> dict[str, np.ndarray]:
    weights = extra.pop("weights", np.full(len(states), 1 / len(states)))
    frozen = extra.pop("frozen", None)
    settings = RobustRule(rule, num_byzantine, **extra)
    return robust_merge(settings, states, weights, own, origin, "product_svd", frozen)


# -- the rules on states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ROBUST)
def test_equal_clients_are_the_identity_bit_for_bit(rule: str) -> None:
    """Also where everybody is what he received: no update, no change."""
    same = state(1)
    merged = merge(rule, same, [dict(same) for _ in range(5)])
    assert merged.keys() == same.keys()
    assert all(np.array_equal(merged[name], same[name]) for name in same)


@pytest.mark.parametrize("rule", ROBUST)
def test_clients_that_learnt_the_same_are_followed(rule: str) -> None:
    origin, learnt = state(0), state(1)
    merged = merge(rule, origin, [dict(learnt) for _ in range(5)])
    np.testing.assert_allclose(products(merged), products(learnt), atol=1e-5)


@pytest.mark.parametrize("rule", COORDINATE_RULES)
def test_equal_clients_are_the_identity_by_coordinates_too(rule: str) -> None:
    same = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    merged = merge(rule, {"w": np.zeros((2, 3), np.float32)}, [dict(same)] * 5)
    assert np.array_equal(merged["w"], same["w"])


def test_krum_chooses_a_model_and_returns_it() -> None:
    origin = state(0)
    states = [close(seed, origin) for seed in range(1, 6)] + [close(9, origin, 5.0)]
    merged = products(merge("krum", origin, states))
    distances = [np.abs(merged - products(own)).max() for own in states]
    updates = np.stack([products(own) for own in states])
    squared = ((updates[:, None] - updates) ** 2).sum(-1)
    best = np.argmin(np.sort(squared, axis=1)[:, 1 : len(states) - 1 - 1].sum(1))
    assert np.argmin(distances) == best
    assert distances[best] < 1e-5
    assert best != 5


@pytest.mark.parametrize("rule", ROBUST)
def test_no_rule_sees_the_gauge_of_the_factors(rule: str) -> None:
    """Every client writes its model with factors of its own; neither the choice nor the merged model changes."""
    origin = state(0)
    states = [close(seed, origin, 0.3) for seed in range(1, 7)]
    plain = products(merge(rule, origin, states))
    changed = [regauged(own, 10 + seed) for seed, own in enumerate(states)]
    other = products(merge(rule, regauged(origin, 99), changed))
    np.testing.assert_allclose(other, plain, atol=2e-5)
    assert not np.allclose(plain, products(origin), atol=1e-2)


@pytest.mark.parametrize("rule", ROBUST)
def test_a_lie_of_any_size_moves_the_result_by_a_bounded_amount(rule: str) -> None:
    origin = state(0)
    honest = [close(seed, origin) for seed in range(1, 7)]
    radius = max(np.linalg.norm(products(own) - products(origin)) for own in honest)
    for size in (10.0, 1e3):
        merged = merge(rule, origin, [*honest, close(42, origin, size)])
        assert np.linalg.norm(products(merged) - products(origin)) < 3.1 * radius, size


def test_the_gram_matrix_is_that_of_the_models() -> None:
    states = [state(seed) for seed in range(3)]
    rows = np.stack([products(own) for own in states])
    np.testing.assert_allclose(state_gram(states, states[0], 1.0), rows @ rows.T, rtol=1e-6)
    scaled = np.stack([products({n: 4 * v if n.endswith("lora_B") else v for n, v in own.items()}) for own in states])
    np.testing.assert_allclose(state_gram(states, states[0], 4.0), scaled @ scaled.T, rtol=1e-6)
    heads = {"head.weight": states[0]["head.weight"]}
    only = np.stack([own["head.weight"].ravel() for own in states]).astype(float)
    np.testing.assert_allclose(
        state_gram([{"head.weight": s["head.weight"]} for s in states], heads, 9.0), only @ only.T
    )


def test_frozen_factors_count_in_the_distance_and_are_not_merged() -> None:
    """LoRA-FA: B travels, distances are those of B A; with orthogonal rows of A that is B's own geometry."""
    frozen = {name: orthonormal_rows(value) for name, value in state(0).items() if name.endswith("lora_A")}
    senders = [{name: value for name, value in state(seed).items() if name.endswith("lora_B")} for seed in range(5)]
    origin = {name: np.zeros_like(value) for name, value in senders[0].items()}
    merged = merge("geometric_median", origin, senders, frozen=frozen)
    assert merged.keys() == origin.keys()
    alone = merge("geometric_median", origin, senders)
    for name in merged:
        np.testing.assert_allclose(merged[name], alone[name], atol=1e-5)
    skewed = {name: value * np.array([[100.0], [0.01]]) for name, value in frozen.items()}
    other = merge("geometric_median", origin, senders, frozen=skewed)
    assert any(not np.allclose(other[name], merged[name], atol=1e-2) for name in merged)


def test_buckets_are_drawn_per_round_and_average_before_the_rule() -> None:
    origin = state(0)
    states = [close(seed, origin, 0.5) for seed in range(1, 7)]
    first = merge("krum", origin, states, num_byzantine=0, bucket_size=2, seed=3, round=1)
    again = merge("krum", origin, states, num_byzantine=0, bucket_size=2, seed=3, round=1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    heads = np.stack([own["head.weight"] for own in states])
    pairs = [(i, j) for i in range(6) for j in range(i)]
    assert min(np.abs(first["head.weight"] - (heads[i] + heads[j]) / 2).max() for i, j in pairs) < 1e-5
    rounds = [merge("krum", origin, states, num_byzantine=0, bucket_size=2, seed=3, round=round) for round in range(8)]
    assert any(not np.array_equal(own["head.weight"], first["head.weight"]) for own in rounds)


@pytest.mark.parametrize(("scale", "is_chosen"), [(1.0, True), (16.0, False)])
def test_krum_judges_deployed_models_and_not_bare_products(scale: float, is_chosen: bool) -> None:
    """An attacker with a head at the honest mean and a shifted adapter is the nearest only if B A is not scaled.

    At alpha / rank = 16 its model is further away than any honest one.
    """
    rng, origin = np.random.default_rng(0), state(0, 0.3)
    honest = [close(seed, origin, 0.02) for seed in range(1, 7)]
    for own in honest:
        own["head.weight"] = origin["head.weight"] + rng.normal(size=(3, 4)).astype(np.float32)
    liar = {name: value + 0.1 * name.endswith("lora_B") for name, value in origin.items()}
    merged = merge("krum", origin, [*honest, liar], lora_scale=scale)
    assert np.allclose(merged["head.weight"], liar["head.weight"], atol=1e-5) is is_chosen


# -- in a method -------------------------------------------------------------------------------------------------------


def method(rule: str, fraction: float = 0.2, **parameters: Any) -> Algorithm:
    robust = RobustParameters(rule=rule, assumed_fraction=fraction)
    made = Algorithm(Algorithm.Parameters(adapters="global", heads="global", robust=robust, **parameters))
    made.head_names = HEADS
    return made


def arrived(
    made: Algorithm,
    states: Sequence[ClientState],
    received: Sequence[ClientState],
    round: int = 2,
    silent: Sequence[int] = (),
) -> RoundUploads:
    uploads = {c: made.pack(c, own) for c, own in enumerate(states) if c not in silent}
    return RoundUploads(round, states, received, uploads, [10] * len(states), {}, seed=0)


def test_one_model_for_all_stays_one_if_no_upload_is_valid() -> None:
    """Clients keep what they received, and of what is their own what they trained."""
    made = method("krum")
    start, trained = state(0), [state(seed) for seed in range(1, 4)]
    received = [dict(start) for _ in trained]
    merged = made.aggregate(arrived(made, trained, received, silent=range(3)))
    assert all(np.array_equal(own[name], start[name]) for own in merged for name in start)
    local = Algorithm(Algorithm.Parameters(adapters="global", heads="local"))
    local.head_names = HEADS
    for own, result in zip(trained, local.aggregate(arrived(local, trained, received, silent=range(3))), strict=True):
        assert np.array_equal(result["head.weight"], own["head.weight"])
        assert np.array_equal(result["m.lora_A"], start["m.lora_A"])


def test_the_median_of_b_is_taken_by_coordinates() -> None:
    """factors=b: A never moves, so B's coordinates mean the same for all; one liar of five is outvoted."""
    made = method("coordinate_median", factors="b")
    start = state(0)
    received = [dict(start) for _ in range(5)]
    trained = [start | {n: v for n, v in state(seed).items() if not n.endswith("lora_A")} for seed in range(1, 6)]
    trained[4] = trained[4] | {"m.lora_B": np.full((5, 2), 1e6, np.float32)}
    merged = made.aggregate(arrived(made, trained, received))
    for own in merged:
        assert np.array_equal(own["m.lora_A"], start["m.lora_A"])
        for name in ("m.lora_B", "n.lora_B", "head.weight"):
            np.testing.assert_allclose(own[name], np.median([s[name] for s in trained], axis=0), atol=1e-5)


@pytest.mark.parametrize("rule", COORDINATE_RULES)
@pytest.mark.parametrize("extra", [{}, {"adapters": "neighbours"}])
def test_coordinate_rules_are_refused_for_lora_pairs(rule: str, extra: dict[str, Any]) -> None:
    raw = {"adapters": "global", "robust": {"rule": rule}} | extra
    with pytest.raises(UserError, match="LoRA pairs") as caught:
        build(Algorithm.Parameters, raw, "algorithm")
    assert (caught.value.key, caught.value.value) == ("algorithm.robust.rule", rule)
    for way_out in ({"factors": "b"}, {"factor_rule": "naive"}, {"model": "full", "adapters": "global"}):
        build(Algorithm.Parameters, raw | way_out, "algorithm")


@pytest.mark.parametrize(("rule", "needs"), [("krum", 5), ("geometric_median", 3), ("centred_clipping", 4)])
@pytest.mark.parametrize("sharing", ["global", "neighbours"])
def test_with_too_few_uploads_all_clients_keep_what_they_received(rule: str, needs: int, sharing: str) -> None:
    """The rule assumes that one upload in five is malicious."""
    made = method(rule)
    made.parameters = made.parameters.model_copy(update={"adapters": sharing, "num_neighbours": 9})
    start, trained = state(0), [state(seed) for seed in range(1, 8)]
    received = [dict(start) for _ in trained]
    merged = made.aggregate(arrived(made, trained, received, silent=range(needs - 1, 7)))
    for own in merged[: needs - 1]:
        assert all(np.array_equal(own[name], start[name]) for name in start)
    enough = made.aggregate(arrived(made, trained, received, silent=range(needs, 7)))
    assert not np.array_equal(enough[0]["head.weight"], start["head.weight"])


def test_a_personal_b_does_not_enter_the_distance_of_a() -> None:
    """factors=a: the coordinator sees no B, not even the first client's; in round 1 all B are 0 and A decides."""
    made = method("krum", factors="a")
    start = state(0) | {"m.lora_B": np.zeros((5, 2), np.float32), "n.lora_B": np.zeros((3, 2), np.float32)}
    received = [dict(start) for _ in range(7)]
    learnt = [
        {f"{m}.lora_A": start[f"{m}.lora_A"] + state(seed, 0.1)[f"{m}.lora_A"] for m in "mn"} for seed in range(7)
    ]
    learnt[0]["m.lora_A"] = learnt[0]["m.lora_A"] + 100
    merged = made.aggregate(arrived(made, [start | own for own in learnt], received, round=1))
    chosen = [np.array_equal(merged[3]["m.lora_A"], own["m.lora_A"]) for own in learnt]
    assert sum(chosen) == 1
    assert not chosen[0]
    personal = [start | {f"{m}.lora_B": state(50 + c)[f"{m}.lora_B"] for m in "mn"} for c in range(7)]
    trained = [before | own for before, own in zip(personal, learnt, strict=True)]
    other = made.aggregate(arrived(made, trained, personal, round=1))
    assert np.array_equal(other[3]["m.lora_A"], merged[3]["m.lora_A"])
    assert np.array_equal(other[3]["m.lora_B"], personal[3]["m.lora_B"])


def test_a_merge_for_all_gives_all_the_same_bits() -> None:
    made = method("geometric_median")
    start, trained = state(0), [state(seed) for seed in range(1, 6)]
    merged = made.aggregate(arrived(made, trained, [start] * 5, silent=(4,)))
    assert all(np.array_equal(own[name], merged[0][name]) for own in merged for name in start)

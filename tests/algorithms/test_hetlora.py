"""HETLoRA: clients of unequal ranks in one stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ClientState, state_bytes
from sylva_ray.federation.contract import Algorithm
from sylva_ray.transport.wire import Wire
from tests.algorithms.toys import (
    arrive,
    equal,
    fleet,
    method,
    starting_states,
    tiny_experiment,
    tiny_worker,
    trained,
)


def beyond(state: ClientState, rank: int) -> list[np.ndarray]:
    """Everything in the slots that a client of ``rank`` does not have."""
    a = [value[rank:] for name, value in state.items() if name.endswith(".lora_A")]
    return a + [value[:, rank:] for name, value in state.items() if name.endswith(".lora_B")]


def slots_of(state: ClientState, module: str = "m") -> np.ndarray:
    """``||b_j|| ||a_j||`` of every slot."""
    return np.asarray(
        np.linalg.norm(state[f"{module}.lora_B"], axis=0) * np.linalg.norm(state[f"{module}.lora_A"], axis=1)
    )


def started(
    ranks: Sequence[int], rank: int = 4, count: int = 3, **parameters: Any
) -> tuple[Algorithm, list[dict[str, np.ndarray]]]:
    """The method, and clients with random factors cut to their ranks."""
    made = method("hetlora_at", ranks=ranks, **parameters)
    return made, [made.initial_state(c, state) for c, state in enumerate(fleet(count, rank=rank))]


def test_slots_beyond_the_rank_stay_zero_through_training_and_rounds() -> None:
    worker = tiny_worker(tiny_experiment("hetlora_at", {"ranks": [1, 2, 4]}))
    made, states = worker.algorithm, starting_states(worker)
    for round in (1, 2):
        after = trained(worker, states, epochs=2, round=round)
        for client, rank in enumerate((1, 2, 4)):
            assert not any(value.any() for value in beyond(after[client], rank))
            assert (slots_of(after[client], "blocks.2.attn.qkv")[:rank] > 0).all()
        states = made.aggregate(arrive(made, after, received=states, round=round))
        for client, rank in enumerate((1, 2, 4)):
            assert not any(value.any() for value in beyond(states[client], rank))
            assert (slots_of(states[client], "blocks.2.attn.qkv")[:rank] > 0).all()
    first = [state["blocks.2.attn.qkv.lora_A"][0] for state in states]
    assert np.array_equal(first[0], first[2]), "the slots that all have are the same for all"


def test_only_a_clients_own_slots_travel() -> None:
    prepared = tiny_experiment("hetlora_at", {"ranks": [1, 2, 4]})
    worker = tiny_worker(prepared)
    states = starting_states(worker)
    wire, sent = Wire(worker.algorithm), []
    for client, state in enumerate(states):
        before = wire.traffic.upload
        assert equal(
            {n: v for n, v in state.items() if ".lora_" in n},
            dict(wire.upload(1, states, {client: state})[client]),
        )
        sent.append(wire.traffic.upload - before)
    one_slot = 4 * 6 * 192 * (1 + 3 + 1 + 1 + 1 + 4 + 4 + 1)  # six blocks of qkv, proj, fc1, fc2, in and out, float32
    assert sent == [one_slot, 2 * one_slot, 4 * one_slot]
    assert state_bytes(worker.algorithm.pack(1, states[1])) == 2 * one_slot


def test_the_mean_is_weighted_by_the_products_norms_and_dilutes_high_ranks_unless_owners_alone_count() -> None:
    diluted, states = started((1, 4), count=2)
    owners = method("hetlora_at", ranks=(1, 4), slots="owners")
    owners.initial_state(0, fleet(1, rank=4)[0])
    norms = [np.sqrt(sum(np.sum((s[f"{m}.lora_B"] @ s[f"{m}.lora_A"]) ** 2) for m in "mn")) for s in states]
    weights = diluted.client_weights(arrive(diluted, states, sizes=[1, 99]), [0, 1])
    np.testing.assert_allclose(weights, norms, rtol=1e-5)
    share = norms[1] / sum(norms)
    everyone, own = (made.aggregate(arrive(made, states))[1] for made in (diluted, owners))
    for name in ("m.lora_A", "n.lora_A"):
        low, high = (state[name].astype(np.float64) for state in states)
        np.testing.assert_allclose(everyone[name][0], (1 - share) * low[0] + share * high[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(everyone[name][1:], share * high[1:], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(own[name][0], everyone[name][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(own[name][1:], high[1:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(own["m.lora_B"][:, 1:], states[1]["m.lora_B"][:, 1:], rtol=1e-5, atol=1e-6)
    assert np.array_equal(own["head.weight"], states[1]["head.weight"])


def test_equal_ranks_and_norms_are_naive_averaging() -> None:
    made, states = started((3,), rank=3)
    for state in states:
        for module in "mn":
            product = np.linalg.norm(state[f"{module}.lora_B"] @ state[f"{module}.lora_A"])
            state[f"{module}.lora_B"] = (state[f"{module}.lora_B"] / product).astype(np.float32)
    naive = method("fedit_at", heads="local", weighting="uniform")
    wanted = naive.aggregate(arrive(naive, states))
    for slots in ("all", "owners"):
        made = method("hetlora_at", ranks=(3,), slots=slots)
        made.initial_state(0, states[0])
        for a, b in zip(made.aggregate(arrive(made, states)), wanted, strict=True):
            for name in a:
                np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slots", ["all", "owners"])
def test_a_round_without_the_highest_rank_kills_none_of_its_slots(slots: str) -> None:
    """With both factors 0 no gradient would ever reach a slot again."""
    made, states = started((1, 2, 4), slots=slots)
    merged = made.aggregate(arrive(made, states, clients=[0, 1]))
    for client, rank in enumerate((1, 2, 4)):
        assert (slots_of(merged[client])[:rank] > 0).all()
        assert not any(value.any() for value in beyond(merged[client], rank))
    for name in ("m.lora_A", "n.lora_A"):
        assert np.array_equal(merged[2][name][2:], states[2][name][2:])
        assert np.array_equal(merged[2][name][:2], merged[1][name][:2])


def test_ranks_beyond_the_common_one_are_refused() -> None:
    for ranks, wrong in (([2, 9], 9), ([0, 2], 0)):
        with pytest.raises(UserError, match=rf"algorithm\.ranks = {wrong}: .*lora\.rank, which is 4") as refused:
            tiny_experiment("hetlora_at", {"ranks": ranks})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "wrong", [{"model": "full"}, {"factors": "a"}, {"factors": "b"}, {"slots": "owners", "factor_rule": "product_svd"}]
)
def test_what_has_no_slots_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"hetlora_at|algorithm.slots|keep model=lora"):
        method("hetlora_at", **wrong)


@pytest.mark.parametrize("names", [{"heads": "global"}, {"heads": "global", "adapters": "neighbours"}])
def test_heads_that_are_merged_without_factors_have_no_slots(names: dict[str, Any]) -> None:
    """As in the warm-up, where heads travel alone."""
    made, states = started((1, 4, 2), slots="owners", **names)
    uploads = arrive(made, states)
    heads = made.merge_for_all(uploads, ["head.weight", "head.bias"], "global", np.ones(3))
    mean = np.mean([state["head.bias"] for state in states], axis=0)
    np.testing.assert_allclose(heads[0]["head.bias"], mean, rtol=1e-5, atol=1e-6)
    made.aggregate(uploads)

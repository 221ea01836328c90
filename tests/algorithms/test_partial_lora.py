"""FFA-LoRA and FedSA-LoRA: one factor travels, the other does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

from sylva_ray.federation.method import Method
from tests.algorithms.toys import (
    arrive,
    equal,
    fleet,
    method,
    moved,
    starting_states,
    tiny_experiment,
    tiny_worker,
    trained,
)

States: TypeAlias = list[dict[str, np.ndarray]]


def kinds(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def one_round(name: str) -> tuple[Method, States, States, States]:
    worker = tiny_worker(tiny_experiment(name))
    start = starting_states(worker)
    after = trained(worker, start, epochs=2)
    merged = worker.algorithm.aggregate(arrive(worker.algorithm, after, received=start, sizes=[10, 20, 30]))
    return worker.algorithm, start, after, merged


def test_ffa_keeps_a_bit_for_bit_and_averages_the_models_exactly() -> None:
    made, start, after, merged = one_round("ffa_lora_at")
    assert kinds(moved(start[0], after[0])) == {"lora_B", "weight", "bias"}
    assert kinds(made.pack(0, after[0])) == {"lora_B"}
    for state in merged:
        assert all(np.array_equal(state[n], start[0][n]) for n in state if n.endswith(".lora_A"))
    for module in ("blocks.0.attn.qkv", "blocks.5.attn.proj"):
        products = [s[f"{module}.lora_B"].astype(np.float64) @ s[f"{module}.lora_A"] for s in after]
        expected = (10 * products[0] + 20 * products[1] + 30 * products[2]) / 60
        for state in merged:
            found = state[f"{module}.lora_B"].astype(np.float64) @ state[f"{module}.lora_A"]
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        assert np.abs(expected).max() > 1e-4


def test_ffa_never_overwrites_a_clients_a() -> None:
    made, states = method("ffa_lora_at"), fleet(3)
    merged = made.aggregate(arrive(made, states))
    assert all(np.array_equal(state["m.lora_A"], own["m.lora_A"]) for state, own in zip(merged, states, strict=True))
    assert np.array_equal(merged[0]["m.lora_B"], merged[2]["m.lora_B"])


def test_fedsa_trains_both_factors_and_sends_a_alone() -> None:
    made, start, after, merged = one_round("fedsa_lora_at")
    assert kinds(moved(start[0], after[0])) == {"lora_A", "lora_B", "weight", "bias"}
    assert kinds(made.pack(0, after[0])) == {"lora_A"}
    a = "blocks.3.attn.qkv.lora_A"
    expected = sum(n * s[a].astype(np.float64) for n, s in zip((10, 20, 30), after, strict=True)) / 60
    for own, state in zip(after, merged, strict=True):
        np.testing.assert_allclose(state[a], expected, rtol=1e-5, atol=1e-8)
        assert kinds(moved(own, state)) == {"lora_A"}
    assert len({state["blocks.3.attn.qkv.lora_B"].tobytes() for state in merged}) == 3


def test_fedsa_clients_that_sent_nothing_receive_a_and_keep_b() -> None:
    made, states = method("fedsa_lora_at"), fleet(3)
    absent = made.aggregate(arrive(made, states, clients=[0, 2]))[1]
    assert kinds(moved(states[1], absent)) == {"lora_A"}
    assert equal(
        {n: v for n, v in absent.items() if not n.endswith("_A")},
        {n: v for n, v in states[1].items() if not n.endswith("_A")},
    )

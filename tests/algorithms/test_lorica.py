"""Lorica: a frozen orthonormal A that makes averages of B exact, and the experts' gates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sylva_ray.aggregation.factors import orthonormal_rows
from sylva_ray.algorithms.lorica import DECAY
from sylva_ray.attacks.losses import cross_entropy, kl_divergence
from tests.algorithms.toys import (
    SMALL,
    arrive,
    equal,
    fleet,
    method,
    moved,
    starting_states,
    tiny_experiment,
    tiny_worker,
    toy,
    trained,
)


def frozen_a(count: int) -> list[dict[str, np.ndarray]]:
    """A fleet as Lorica starts it: one orthonormal A for all."""
    made, states = method("lorica"), fleet(count)
    return [state | {n: v for n, v in made.initial_state(0, states[0]).items() if n.endswith("_A")} for state in states]


def test_a_starts_with_orthogonal_rows_of_the_usual_norm_that_span_what_was_drawn() -> None:
    (drawn,) = fleet(1)
    made = method("lorica").initial_state(0, drawn)
    a = made["m.lora_A"].astype(np.float64)
    np.testing.assert_allclose(a @ a.T, np.eye(2) / 3, atol=1e-6)
    inside = drawn["m.lora_A"] @ a.T @ a * 3
    np.testing.assert_allclose(inside, drawn["m.lora_A"], atol=1e-5)
    assert moved(drawn, made) == {"m.lora_A", "n.lora_A"}
    assert equal(made, method("lorica").initial_state(7, drawn)), "the same for all clients"
    b, c = (np.random.default_rng(s).normal(size=(5, 2)) for s in (1, 2))
    assert np.linalg.norm((b - c) @ a) == pytest.approx(np.linalg.norm(b - c) / 3**0.5, rel=1e-6)
    assert made["m.lora_A"].dtype == np.float32
    np.testing.assert_allclose(orthonormal_rows(a), a, atol=1e-7)


def test_the_mean_of_products_is_the_product_of_means() -> None:
    states = frozen_a(4)
    made = method("lorica", adapters="global", robust={"rule": "mean"})
    sizes = [10, 20, 30, 40]
    merged = made.aggregate(arrive(made, states, sizes=sizes))[2]
    products = [s["m.lora_B"].astype(np.float64) @ s["m.lora_A"] for s in states]
    expected = sum(n * product for n, product in zip(sizes, products)) / 100
    np.testing.assert_allclose(merged["m.lora_B"] @ merged["m.lora_A"], expected, atol=1e-6)


def test_a_stays_the_same_for_all_and_only_b_travels_over_rounds_of_real_training() -> None:
    worker = tiny_worker(tiny_experiment("lorica"))
    made, states = worker.algorithm, starting_states(worker)
    start = states
    for round in (1, 2):
        after = trained(worker, states, round=round)
        for before, client in zip(states, after, strict=True):
            assert {n.rpartition(".")[2] for n in moved(before, client)} == {"lora_B", "weight", "bias"}
        packed = made.pack(0, after[0])
        assert {n.rpartition(".")[2] for n in packed} == {"lora_B"}
        assert packed.keys() == {n for n in after[0] if n.endswith(".lora_B")}
        states = made.aggregate(arrive(made, after, round=round, received=states))
    for state in states:
        assert all(np.array_equal(state[n], start[0][n]) for n in state if n.endswith(".lora_A"))
    assert not np.array_equal(states[0]["blocks.0.attn.qkv.lora_B"], after[0]["blocks.0.attn.qkv.lora_B"])


def test_gates_by_hand() -> None:
    context, _, b = toy()
    made = method("lorica", temperature=0.5, floor=0.1)
    alike = torch.full((2, 4), 3.0)
    torch.testing.assert_close(made.gates(context, alike, b.active), torch.full((2, 4), 0.25))
    means = torch.tensor([[3.0, 3.0, 3.0, 3.0], [3.0, 1.0, 6.0, 0.0]])
    found = made.gates(context, means, torch.tensor([False, True]))
    ratio = (DECAY * alike + (1 - DECAY) * means)[1] / 3
    torch.testing.assert_close(found[1], 0.6 * F.softmax(ratio / 0.5, 0) + 0.1)
    torch.testing.assert_close(found[0], torch.full((4,), 0.25))  # who had no images remembers nothing new
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    paused = made.gates(context, torch.zeros(2, 4), torch.tensor([False, False]))
    assert torch.equal(paused, found)


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.25])
def test_no_gate_falls_below_its_floor(floor: float) -> None:
    context, _, b = toy()
    made = method("lorica", temperature=0.01, floor=floor)
    made.gates(context, torch.ones(2, 4), b.active)
    gates = made.gates(context, torch.tensor([[100.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 50.0]]), b.active)
    assert gates.min() == pytest.approx(floor, abs=1e-6)
    torch.testing.assert_close(gates.sum(1), torch.ones(2))
    assert gates[0, 0] == gates[0].max()


def test_a_first_loss_of_nothing_divides_by_no_zero() -> None:
    context, _, b = toy()
    gates = method("lorica").gates(context, torch.zeros(2, 4), b.active)
    torch.testing.assert_close(gates, torch.full((2, 4), 0.25))


def test_the_loss_is_the_gated_sum_of_its_experts_and_no_gradient_flows_through_the_gates() -> None:
    context, params, b = toy()
    made = method("lorica", prior=0.7)
    first = made.craft(context, params, b, SMALL)
    made.sample_losses(context, params, replace(b, x=b.x.flip(0)), first)  # so that the gates differ
    memory = dict(context.scratch)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    found = made.sample_losses(context, leaves, b, first)
    log_n = torch.tensor([[4.0, 1.0, 1.0], [2.0, 2.0, 3.0]]).log()[b.owner]
    clean, attacked = (context.model.forward(leaves, x, b.owner) for x in (b.x, first))
    experts = [cross_entropy(attacked, b.y), cross_entropy(clean, b.y), kl_divergence(clean, attacked)]
    experts.append(cross_entropy(attacked + 0.7 * log_n, b.y))
    context.scratch.update(memory)
    means = torch.stack([b.mean_by_client(e.detach()) for e in experts], 1)
    gates = made.gates(context, means, b.active)
    assert not gates.requires_grad
    assert gates.std() > 1e-3
    expected = sum(gates[b.owner, e] * expert for e, expert in enumerate(experts))
    torch.testing.assert_close(found, expected)
    for got, want in zip(
        torch.autograd.grad(found.sum(), list(leaves.values())),
        torch.autograd.grad(expected.sum(), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(got, want)

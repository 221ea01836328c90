"""Sylva's client and server halves on closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sylva_ray.algorithms.adversarial import class_weights, mart, trades
from sylva_ray.algorithms.base import Algorithm, Batch, Cohort
from sylva_ray.algorithms.registry import ALGORITHMS, create_algorithm
from sylva_ray.algorithms.sylva import Sylva
from sylva_ray.attacks.losses import boosted_cross_entropy, cross_entropy
from sylva_ray.config import AlgorithmSection
from sylva_ray.timing import Stopwatch
from sylva_ray.types import AttackSpec
from tests.attacks.test_pgd import LinearCohort, batch


def linear_batch():
    params, x, y, owner = batch(10)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cohort = Cohort(LinearCohort(), torch.tensor([[3, 2], [0, 5]]), {}, Stopwatch())
    return cohort, params, Batch(x, y, owner, noise, torch.tensor([True, True]))


NOTHING = AttackSpec("pgd", 0.0, 3, 0.0)
SMALL = AttackSpec("pgd", 0.05, 5, 0.02)


def test_class_weights_in_their_limits():
    balanced, skewed = torch.tensor([[5, 5, 5]]), torch.tensor([[100, 10, 0]])
    torch.testing.assert_close(class_weights(balanced, 0.999), torch.ones(1, 3, dtype=torch.float64))
    torch.testing.assert_close(class_weights(skewed, 0.0), torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64))
    near_one = class_weights(skewed, 1 - 1e-9)[0]
    assert near_one[2] == 0
    assert near_one[1] / near_one[0] == pytest.approx(10, rel=1e-4)
    assert class_weights(skewed, 0.999).sum() == pytest.approx(2)


def test_trades_without_budget_is_cross_entropy_in_value_and_gradient():
    cohort, params, b = linear_batch()
    leaves = {n: v.clone().requires_grad_() for n, v in params.items()}
    loss = trades(cohort, leaves, b, NOTHING, 6.0)
    expected = cross_entropy(cohort.model.forward(leaves, b.x, b.owner), b.y)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(
        torch.autograd.grad(loss.sum(), list(leaves.values())),
        torch.autograd.grad(expected.sum(), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_mart_without_budget_has_no_divergence_term():
    cohort, params, b = linear_batch()
    expected = boosted_cross_entropy(cohort.model.forward(params, b.x, b.owner), b.y)
    torch.testing.assert_close(mart(cohort, params, b, NOTHING, 5.0), expected)


@pytest.mark.parametrize("loss", ["ce_adv", "trades", "mart"])
def test_every_loss_exceeds_its_benign_value_and_yields_gradients_per_client(loss):
    cohort, params, b = linear_batch()
    method = Sylva(Sylva.Parameters(loss=loss))
    attacked = method.sample_losses(cohort, params, b, SMALL)
    quiet = method.sample_losses(cohort, params, b, NOTHING)
    assert attacked.mean() > quiet.mean()
    gradients, losses = method.client_step(cohort, params, b, SMALL, ["w"])
    assert set(gradients) == {"w"}
    torch.testing.assert_close(losses, b.mean_per_client(attacked))


def test_a_cohorts_gradient_is_each_clients_own():
    cohort, params, b = linear_batch()
    together, _ = Sylva(Sylva.Parameters()).client_step(cohort, params, b, SMALL, ["w", "b"])
    for client in range(2):
        own = b.owner == client
        alone = Batch(b.x[own], b.y[own], torch.zeros(int(own.sum()), dtype=torch.long), b.noise[own], b.active[:1])
        gradients, _ = Sylva(Sylva.Parameters()).client_step(
            cohort, {n: v[client : client + 1] for n, v in params.items()}, alone, SMALL, ["w", "b"]
        )
        for name, gradient in gradients.items():
            torch.testing.assert_close(together[name][client], gradient[0], rtol=1e-6, atol=1e-7)


def test_benign_weight_and_class_balance_enter_as_written():
    cohort, params, b = linear_batch()
    plain = Sylva(Sylva.Parameters()).sample_losses(cohort, params, b, SMALL)
    clean = cross_entropy(cohort.model.forward(params, b.x, b.owner), b.y)
    mixed = Sylva(Sylva.Parameters(benign_weight=0.5)).sample_losses(cohort, params, b, SMALL)
    torch.testing.assert_close(mixed, plain + 0.5 * clean)
    weighted = Sylva(Sylva.Parameters(class_balance=0.9)).sample_losses(cohort, params, b, SMALL)
    weights = class_weights(cohort.class_counts, 0.9)[b.owner, b.y].float()
    torch.testing.assert_close(weighted, plain * weights)


def states(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = {"m.lora_A": (2, 6), "m.lora_B": (5, 2), "head.weight": (3, 4), "head.bias": (3,)}
    return [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(count)]


def uploads_of(method: Algorithm, fleet, clients=None):
    clients = range(len(fleet)) if clients is None else clients
    return {c: {n: v for n, v in fleet[c].items() if method.uploads(n)} for c in clients}


@pytest.mark.parametrize("name", ["sylva", "sylva_paper_like", "undefended"])
@pytest.mark.parametrize("round", [1, 5])
def test_heads_stay_at_home_and_identical_clients_stay_what_they_are(name, round):
    method = create_algorithm(AlgorithmSection(name=name))
    method.head_names = ("head.weight", "head.bias")
    fleet = states(4)
    assert set(uploads_of(method, fleet)[0]) == {"m.lora_A", "m.lora_B"}
    merged = method.aggregate(round, fleet, uploads_of(method, fleet), [10, 20, 30, 40])
    for before, after in zip(fleet, merged, strict=True):
        assert np.array_equal(before["head.weight"], after["head.weight"])
        assert not np.array_equal(before["m.lora_B"], after["m.lora_B"])
    twins = [fleet[0] | {"head.bias": other["head.bias"]} for other in fleet]
    for before, after in zip(
        twins, method.aggregate(round, twins, uploads_of(method, twins), [1, 2, 3, 4]), strict=True
    ):
        assert all(np.array_equal(before[n], after[n]) for n in before)


def test_global_sharing_gives_everybody_the_same_bits():
    method = Algorithm(Algorithm.Parameters(adapters="global", heads="global"))
    method.head_names = ("head.weight", "head.bias")
    fleet = states(3)
    merged = method.aggregate(3, fleet, uploads_of(method, fleet, [0, 2]), [1, 1, 2])
    assert all(np.array_equal(merged[0][n], merged[c][n]) for n in fleet[0] for c in (1, 2))
    expected = (fleet[0]["head.bias"] + 2 * fleet[2]["head.bias"]) / 3
    np.testing.assert_allclose(merged[1]["head.bias"], expected, rtol=1e-6)


def test_who_sends_nothing_keeps_its_state_and_a_broken_upload_is_left_out():
    method = Sylva(Sylva.Parameters())
    method.head_names = ("head.weight", "head.bias")
    fleet = states(4)
    uploads = uploads_of(method, fleet, [0, 1, 3])
    uploads[3] = uploads[3] | {"m.lora_A": np.full((2, 6), np.nan, np.float32)}
    merged = method.aggregate(4, fleet, uploads, [1, 1, 1, 1])
    assert all(np.array_equal(merged[2][n], fleet[2][n]) for n in fleet[2])
    assert all(np.isfinite(v).all() for state in merged for v in state.values())
    without = method.aggregate(4, fleet, uploads_of(method, fleet, [0, 1]), [1, 1, 1, 1])
    assert all(np.array_equal(merged[0][n], without[0][n]) for n in fleet[0])


def test_local_methods_upload_nothing():
    method = create_algorithm(AlgorithmSection(name="local_lora"))
    method.head_names = ("head.weight", "head.bias")
    assert uploads_of(method, states(1)) == {0: {}}


def test_registry_builds_every_method_and_methods_of_others():
    for name in ALGORITHMS:
        assert create_algorithm(AlgorithmSection(name=name)).name == name
    theirs = create_algorithm(AlgorithmSection(name="sylva_ray.algorithms.sylva:Sylva", beta=3))
    assert theirs.parameters.beta == 3

"""The full-model baselines: closed forms of their losses, gradients, schedules and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sylva_ray.algorithms.adversarial import craft_ce, craft_kl, mart, trades
from sylva_ray.attacks.losses import boosted_cross_entropy, cross_entropy, kl_divergence
from sylva_ray.config.training import TrainingSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.federation.client.optim import StackedOptimizer
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.contract import Algorithm
from tests.algorithms.toys import (
    HEADS,
    NOTHING,
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
    watch,
)

BASELINES = [
    *("fedavg_at", "fedavg_at_ft", "fedtrades", "fedmart", "fedprox_at", "fedawp"),
    *("fedper_at", "fedrep_at", "calfat", "dbfat", "sfat"),
]


def with_gradient(
    loss: Callable[..., torch.Tensor], context: ClientContext, params: ParameterStack, *rest: Any
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    losses = loss(context, leaves, *rest)
    return losses.detach(), torch.autograd.grad(losses.sum(), list(leaves.values()))


# -- TRADES, MART ------------------------------------------------------------------------------------------------------


def test_trades_without_budget_is_cross_entropy_in_value_and_gradient() -> None:
    context, params, b = toy()
    x_adv = craft_kl(context, params, b, NOTHING)
    assert torch.equal(x_adv, b.x)
    found = with_gradient(trades, context, params, b, x_adv, 6.0)
    wanted = with_gradient(lambda c, p: cross_entropy(c.model.forward(p, b.x, b.owner), b.y), context, params)
    torch.testing.assert_close(found, wanted)


def test_trades_gradient_flows_through_both_arguments() -> None:
    context, params, b = toy()
    x_adv = craft_kl(context, params, b, SMALL)
    p, q = (F.softmax(context.model.forward(params, x, b.owner), 1) for x in (b.x, x_adv))
    expected = cross_entropy(context.model.forward(params, b.x, b.owner), b.y) + 6 * (p * (p / q).log()).sum(1)
    _, both = with_gradient(trades, context, params, b, x_adv, 6.0)

    def one_sided(c: ClientContext, leaves: ParameterStack) -> torch.Tensor:
        clean = c.model.forward(leaves, b.x, b.owner)
        return cross_entropy(clean, b.y) + 6 * kl_divergence(clean.detach(), c.model.forward(leaves, x_adv, b.owner))

    value, one = with_gradient(one_sided, context, params)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(trades(context, params, b, x_adv, 6.0), expected)
    assert (both[0] - one[0]).abs().max() > 1e-3


def test_the_divergence_is_attacked_from_a_random_point_always() -> None:
    """At x itself its gradient is 0, so an attack that started there would stay there."""
    context, params, b = toy()
    still = replace(SMALL, random_start=False)
    moved_by = (craft_kl(context, params, b, still) - b.x).flatten(1).abs().amax(1)
    assert (moved_by > 0.04).all()
    clean = context.model.forward(params, b.x, b.owner)
    reached = kl_divergence(clean, context.model.forward(params, craft_kl(context, params, b, still), b.owner))
    start = context.model.forward(params, (b.x + SMALL.epsilon * b.noise).clamp(0, 1), b.owner)
    assert (reached > kl_divergence(clean, start)).all()


def test_mart_without_budget_has_no_divergence_term_and_its_weight_is_the_doubt() -> None:
    context, params, b = toy()
    boosted = boosted_cross_entropy(context.model.forward(params, b.x, b.owner), b.y)
    torch.testing.assert_close(mart(context, params, b, b.x, 5.0), boosted)
    x_adv = craft_ce(context, params, b, SMALL)
    moved_logits = context.model.forward(params, x_adv, b.owner)
    clean = context.model.forward(params, b.x, b.owner)
    extra = mart(context, params, b, x_adv, 5.0) - boosted_cross_entropy(moved_logits, b.y)
    doubt = 1 - clean.softmax(1)[torch.arange(len(b.y)), b.y]
    assert (extra > -1e-6).all()
    torch.testing.assert_close(extra, 5 * doubt * kl_divergence(clean, moved_logits), rtol=1e-4, atol=1e-5)
    sure = {"w": torch.zeros(2, 3, 48), "b": torch.full((2, 3), 0.0)}
    sure["b"][:, 1] = 60.0  # p_1 = 1 in float32, whatever the image
    sure["w"][:, 0] = torch.randn(48)
    ones = replace(b, y=torch.ones_like(b.y))
    moved_logits = context.model.forward(sure, x_adv, b.owner)
    torch.testing.assert_close(mart(context, sure, ones, x_adv, 5.0), boosted_cross_entropy(moved_logits, ones.y))


# -- FedAvg ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BASELINES, "fedit_at", "ffa_lora_at", "fedsa_lora_at", "lorica"])
def test_identical_clients_stay_what_they_are_and_their_order_is_nothing(name: str) -> None:
    made = method(name, **({} if name == "lorica" else {"weighting": "samples"}))
    sizes, losses = [10, 20, 30, 40], [0.4, 0.3, 0.2, 0.1]
    twins = fleet(1) * 4
    for merged in made.aggregate(arrive(made, twins, sizes=sizes, losses=losses)):
        assert equal(merged, twins[0])
    states = fleet(4)
    states = [state | {n: states[0][n] for n in state if not made.is_trained(n)} for state in states]
    whole = made.aggregate(arrive(made, states, sizes=sizes, losses=losses))
    assert not equal(whole[1], states[1])
    turned = made.aggregate(arrive(made, states[::-1], sizes=sizes[::-1], losses=losses[::-1]))[::-1]
    for a, b in zip(whole, turned, strict=True):
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_builds_full_and_with_adapters(name: str) -> None:
    for model in ("full", "lora"):
        made = method(name, model=model)
        states = fleet(3)
        assert made.parameters.model == model
        assert method(name).parameters.model == "full"
        shared = set(made.pack(0, states[0]))
        assert shared == set(states[0]) - (set(HEADS) if name in ("fedper_at", "fedrep_at") else set())


@pytest.mark.parametrize("model", ["full", "lora"])
def test_a_baseline_trains_everything_or_its_adapters(model: str) -> None:
    worker = tiny_worker(tiny_experiment("fedavg_at", {"model": model}))
    (start, *_), (after,) = (states := starting_states(worker)), trained(worker, states, clients=(0,))
    assert any(n.endswith(".lora_A") for n in start) == (model == "lora")
    assert moved(start, after) == set(start)


def test_fedit_averages_factors_apart_and_the_exact_rule_their_products() -> None:
    """(B, A) and (-B, -A) are the same model: naive averaging kills it, the exact mean keeps it."""
    (state,) = fleet(1)
    mirrored = {n: -v if ".lora_" in n else v for n, v in state.items()}
    products = {}
    for rule in ("naive", "product_svd"):
        made = method("fedit_at", factor_rule=rule)
        merged = made.aggregate(arrive(made, [state, mirrored]))[0]
        products[rule] = merged["m.lora_B"] @ merged["m.lora_A"]
    assert method("fedit_at").parameters.factor_rule == "naive"
    assert not products["naive"].any()
    np.testing.assert_allclose(products["product_svd"], state["m.lora_B"] @ state["m.lora_A"], atol=1e-5)


@pytest.mark.parametrize("name", ["per_lora", "per_adv"])
def test_local_methods_upload_nothing(name: str) -> None:
    made, states = method(name), fleet(3)
    assert made.pack(0, states[0]) == {}
    nothing = arrive(made, states, clients=[])
    assert all(equal(a, b) for a, b in zip(made.aggregate(nothing), states, strict=True))


# -- FedProx -----------------------------------------------------------------------------------------------------------


def test_fedprox_gradient_is_that_of_the_penalised_loss() -> None:
    context, params, b = toy()
    plain, losses = method("fedavg_at").client_step(context, params, b, SMALL, ["w", "b"])
    held, same_losses = method("fedprox_at", mu=0.3).client_step(context, params, b, SMALL, ["w", "b"])
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    penalty = 0.15 * torch.stack([((leaves[name] - context.received[name]) ** 2).sum() for name in leaves]).sum()
    for name, pull in zip(leaves, torch.autograd.grad(penalty, list(leaves.values())), strict=True):
        assert pull.abs().max() > 1e-3
        torch.testing.assert_close(held[name], plain[name] + pull)
    torch.testing.assert_close(losses, same_losses)


def test_fedprox_without_mu_is_fedavg_bit_for_bit_and_with_a_huge_one_stands_still() -> None:
    context, params, b = toy()
    plain, _ = method("fedavg_at").client_step(context, params, b, SMALL, ["w"])
    loose, _ = method("fedprox_at", mu=0).client_step(context, params, b, SMALL, ["w"])
    assert torch.equal(plain["w"], loose["w"])
    mu = 1e6  # with a step of 1 / mu the penalty's own step ends at theta_t exactly
    tight, _ = method("fedprox_at", mu=mu).client_step(context, params, b, SMALL, ["w"])
    optimizer = StackedOptimizer(params, TrainingSection(optimizer="sgd", weight_decay=0, clip_norm=None), 1 / mu)
    optimizer.step(tight, b.active)
    torch.testing.assert_close(params["w"], context.received["w"], rtol=0, atol=1e-5)


# -- AWP ---------------------------------------------------------------------------------------------------------------


def perturbed_weights(
    made: Algorithm, context: ClientContext, params: ParameterStack, b: Batch, names: Sequence[str] = ("w", "b")
) -> tuple[list[ParameterStack], ParameterStack]:
    """Every stack on which the method took a loss, and the gradients that came out."""
    model: Any = context.model
    seen, forward = [], model.forward

    def spy(p: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        seen.append({name: value.detach().clone() for name, value in p.items()})
        logits: torch.Tensor = forward(p, x, owner)
        return logits

    model.forward = spy
    gradients, _ = made.gradients(context, params, b, b.x, list(names))
    model.forward = forward
    return seen, gradients


def test_awp_moves_every_clients_matrix_by_gamma_of_its_norm_up_the_loss() -> None:
    """Vectors, and what is no weight of a layer (tokens, positions), are left alone."""
    context, toys, b = toy()
    names = ["m.weight", "m.bias", "pos_embed"]
    params = dict(zip(names, (toys["w"], toys["b"], torch.ones(2, 1, 3, 1)), strict=True))
    model: Any = context.model
    of_toy = model.forward

    def forward(p: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = of_toy({"w": p["m.weight"], "b": p["m.bias"]}, x, owner)
        return logits + p["pos_embed"].flatten(1)[owner]

    model.forward = forward
    before = {name: value.clone() for name, value in params.items()}
    (at_w, shifted), gradients = perturbed_weights(method("fedawp", gamma=0.05), context, params, b, names)
    assert all(torch.equal(at_w[n], before[n]) and torch.equal(params[n], before[n]) for n in params)
    step = shifted["m.weight"] - before["m.weight"]
    torch.testing.assert_close(step.flatten(1).norm(dim=1), 0.05 * before["m.weight"].flatten(1).norm(dim=1))
    assert all(torch.equal(shifted[name], before[name]) for name in ("m.bias", "pos_embed"))
    plain, losses = method("fedavg_at").gradients(context, params, b, b.x, names)
    cosine = F.cosine_similarity(step.flatten(1), plain["m.weight"].flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2))
    there, higher = method("fedavg_at").gradients(context, shifted, b, b.x, names)
    assert (higher > losses).all()
    torch.testing.assert_close(gradients, there)


def test_awp_of_a_factor_that_is_still_zero_borrows_its_partners_norm() -> None:
    context, params, b = toy(owned=(4, 4))
    factors = {
        "m.lora_A": torch.randn(2, 2, 48, generator=torch.Generator().manual_seed(1)),
        "m.lora_B": torch.zeros(2, 3, 2),
    }
    base = params["w"]

    def forward(p: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        w = base + p["m.lora_B"] @ p["m.lora_A"]
        return torch.einsum("nd,ncd->nc", x.flatten(1), w[owner])

    model: Any = context.model
    model.forward = forward
    (_, shifted), _ = perturbed_weights(method("fedawp", gamma=0.1), context, factors, b, list(factors))
    expected = 0.1 * 0.01 * factors["m.lora_A"].flatten(1).norm(dim=1)
    torch.testing.assert_close(shifted["m.lora_B"].flatten(1).norm(dim=1), expected)
    assert torch.equal(shifted["m.lora_A"], factors["m.lora_A"])  # its gradient is 0 while B is


def test_awp_leaves_the_weights_where_they_are_when_the_step_is_nothing() -> None:
    worker = tiny_worker(tiny_experiment("fedawp", {"model": "lora"}))
    states = starting_states(worker)
    for before, after in zip(states, trained(worker, states, lr=0.0), strict=True):
        assert equal(before, after)


# -- FedRep ------------------------------------------------------------------------------------------------------------


def test_fedrep_trains_the_head_then_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method("fedrep_at")
    names = ["m.lora_A", *HEADS]
    assert made.schedule(5, names) == [(4, list(HEADS)), (1, ["m.lora_A"])]
    worker = tiny_worker(tiny_experiment("fedrep_at", {"model": "lora"}, training={"local_epochs": 2}))
    seen, states = [], starting_states(worker)
    step = type(worker.algorithm).client_step

    def spy(
        self: Algorithm,
        context: ClientContext,
        params: ParameterStack,
        batch: Batch,
        attack: AttackSpec,
        trained_names: Sequence[str],
    ) -> Any:
        seen.append({name: params[name].clone() for name in params})
        return step(self, context, params, batch, attack, trained_names)

    monkeypatch.setattr(worker.algorithm, "client_step", spy.__get__(worker.algorithm))
    (end,) = trained(worker, states, epochs=2, clients=(0,))
    seen.append({name: torch.from_numpy(value)[None] for name, value in end.items()})
    moves = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in pairwise(seen)]
    head = set(worker.model.head_names)
    half = len(moves) // 2
    assert half >= 1
    assert all(move == head for move in moves[:half])
    assert all(move and not move & head for move in moves[half:])


def test_fedrep_refuses_too_few_epochs_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"training\.local_epochs = 1: .*at least 2") as refused:
        tiny_experiment("fedrep_at")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="final_local_epochs"):
        tiny_experiment("fedrep_at", {"final_local_epochs": 1}, training={"local_epochs": 2})
    with pytest.raises(UserError, match="final_local_epochs"):
        tiny_experiment("fedrep_at", {"body_epochs": 2}, training={"local_epochs": 3})
    assert method("fedrep_at", final_local_epochs=0).parameters.final_local_epochs == 0


# -- CalFAT ------------------------------------------------------------------------------------------------------------


def test_calfat_is_the_scaled_cross_entropy_of_calibrated_logits() -> None:
    context, params, b = toy()
    x_adv = method("calfat").craft(context, params, b, SMALL)
    logits = context.model.forward(params, x_adv, b.owner)
    log_n = torch.tensor([[4.0, 1.0, 1.0], [2.0, 2.0, 3.0]]).log()[b.owner]  # a class without images counts as 1
    expected = F.cross_entropy(10 * logits + log_n, b.y, reduction="none")
    torch.testing.assert_close(
        method("calfat").sample_losses(context, params, b, x_adv), expected, rtol=1e-4, atol=1e-4
    )


def test_calfat_of_equal_counts_and_no_scale_is_adversarial_training_with_the_attack_of_trades() -> None:
    context, params, b = toy(counts=((5, 5, 5), (7, 7, 7)))
    flat = method("calfat", scale=1)
    x_adv = flat.craft(context, params, b, SMALL)
    torch.testing.assert_close(x_adv, craft_kl(context, params, b, SMALL))
    found = flat.gradients(context, params, b, x_adv, ["w", "b"])
    torch.testing.assert_close(found, method("fedavg_at").gradients(context, params, b, x_adv, ["w", "b"]))


def test_calfat_attacks_the_calibrated_prediction_without_the_scale() -> None:
    context, params, b = toy(counts=((400, 1, 0), (1, 2, 300)))
    made = method("calfat", prior=1.0)
    x_adv = made.craft(context, params, b, SMALL)
    torch.testing.assert_close(x_adv, method("calfat", prior=1.0, scale=3).craft(context, params, b, SMALL))
    shifted = {"w": params["w"], "b": params["b"] + torch.tensor([[400.0, 1.0, 1.0], [1.0, 2.0, 300.0]]).log()}
    torch.testing.assert_close(x_adv, craft_kl(context, shifted, b, SMALL))
    assert not torch.equal(x_adv, craft_kl(context, params, b, SMALL))


def test_calfat_counts_clients_alike() -> None:
    made, states = method("calfat"), fleet(2)
    merged = made.aggregate(arrive(made, states, sizes=[1, 99]))[0]
    expected = (states[0]["head.bias"] + states[1]["head.bias"]) / 2
    np.testing.assert_allclose(merged["head.bias"], expected, rtol=1e-6)


# -- DBFAT -------------------------------------------------------------------------------------------------------------


def test_dbfat_weighs_images_by_the_step_at_which_they_fall() -> None:
    """Planted falls: a two-sided score that an attack of known speed drags over the boundary."""
    context, params, b = toy(owned=(4, 2))
    params = {"w": torch.zeros(2, 3, 48), "b": torch.zeros(2, 3)}
    params["w"][:, 0] = 1.0  # class 0 wins by 48 (mean pixel - level), which a step of s lowers by 48 s
    levels = torch.tensor([0.485, 0.445, 0.1, 0.485, 0.1, 0.1])
    x = torch.full_like(b.x, 0.5)
    y = torch.tensor([0, 0, 0, 1, 0, 0])
    model: Any = context.model
    model.forward = lambda p, u, owner: (
        torch.stack([48 * (u.flatten(1).mean(1) - levels), torch.zeros(6), torch.full((6,), -50.0)], 1)
        + 0 * p["b"][owner]
    )
    attack = AttackSpec("pgd", 0.2, 4, 0.02, random_start=False)
    made = method("dbfat", beta=0.0)
    x_adv = made.craft(context, params, replace(b, x=x, y=y), attack)
    # 0.5 - 0.02 d < 0.485 after 1 step, < 0.445 after 3, never < 0.1; the fourth is wrong from the start.
    closeness = torch.exp(-torch.tensor([1.0, 3.0, 4.0, 0.0, 4.0, 4.0]) / 4)
    torch.testing.assert_close(context.scratch["closeness"], closeness)
    rho = torch.cat([closeness[:4] / closeness[:4].mean(), torch.ones(2)])
    logits = context.model.forward(params, x_adv, b.owner)
    found = made.sample_losses(context, params, replace(b, x=x, y=y), x_adv)
    torch.testing.assert_close(found, rho * cross_entropy(logits, y))
    torch.testing.assert_close(b.mean_by_client(rho), torch.ones(2))


def test_dbfat_without_budget_and_reference_is_cross_entropy() -> None:
    context, params, b = toy()
    made = method("dbfat", beta=0.0)
    x_adv = made.craft(context, params, b, NOTHING)
    expected = cross_entropy(context.model.forward(params, b.x, b.owner), b.y)
    torch.testing.assert_close(made.sample_losses(context, params, b, x_adv), expected)


def test_dbfat_holds_the_prediction_to_the_received_models_clean_one_which_gets_no_gradient() -> None:
    context, params, b = toy()
    context.received["w"].requires_grad_()
    made, free = method("dbfat"), method("dbfat", beta=0.0)
    x_adv = made.craft(context, params, b, SMALL)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    held = made.sample_losses(context, leaves, b, x_adv)
    with torch.no_grad():
        reference = context.model.forward(context.received, b.x, b.owner)
        attacked = context.model.forward(params, x_adv, b.owner)
        expected = free.sample_losses(context, params, b, x_adv) + 1.5 * kl_divergence(reference, attacked)
    torch.testing.assert_close(held.detach(), expected)
    (to_received,) = torch.autograd.grad(held.sum(), context.received["w"], allow_unused=True)
    assert to_received is None


# -- SFAT --------------------------------------------------------------------------------------------------------------


def test_sfat_leans_towards_the_client_with_the_smallest_loss_from_round_2_on() -> None:
    made, states = method("sfat"), fleet(3)
    late = arrive(made, states, sizes=[10, 20, 30], losses=[0.5, 0.1, 0.3], round=2)
    assert made.client_weights(late, [0, 1, 2]) == pytest.approx([10, 28, 30])
    assert made.client_weights(late, [0, 2]) == pytest.approx([10, 42])  # the second client did not arrive
    merged = made.aggregate(late)[0]["head.bias"]
    np.testing.assert_allclose(merged, sum(w * s["head.bias"] for w, s in zip((10, 28, 30), states)) / 68, rtol=1e-5)
    for round in (0, 1):
        early = replace(late, round=round)
        assert made.client_weights(early, [0, 1, 2]) == pytest.approx([10, 20, 30])
    assert method("sfat", favoured=0).client_weights(late, [0, 1, 2]) == pytest.approx([10, 20, 30])


# -- running statistics ------------------------------------------------------------------------------------------------


RESNET = {"name": "test_resnet.r160_in1k", "image_size": 32}


@pytest.mark.parametrize(
    ("name", "parameters"), [("fedavg_at", {}), ("dbfat", {}), ("fedawp", {"gamma": 0}), ("fedprox_at", {})]
)
def test_running_statistics_move_once_per_step_for_each_client_and_never_in_crafting_or_in_references(
    name: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of two clients, against one pass of PyTorch's own module in training mode over the crafted images."""
    worker = tiny_worker(tiny_experiment(name, parameters, backbone=RESNET, training={"batch_size": 1000}))
    states = starting_states(worker)
    contexts, crafted = watch(worker, monkeypatch)
    after = trained(worker, states, clients=(1, 2), lr=0.0)
    ((batch, x_adv),) = crafted
    module = worker.model.backbone
    for row, state in enumerate(after):
        module.model.load_state_dict({n: torch.from_numpy(v) for n, v in states[1].items()}, strict=False)
        module.train()(x_adv[batch.owner == row])
        statistics = {n: v for n, v in module.model.named_buffers() if "running" in n}
        assert statistics.keys() == moved(states[1], state)
        for key, value in statistics.items():
            np.testing.assert_allclose(state[key], value.numpy(), rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(v[row], states[1][n]) for row in (0, 1) for n, v in contexts[0].received.items())

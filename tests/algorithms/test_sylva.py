"""Sylva's client and server halves on closed forms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sylva_ray.algorithms.adversarial import class_weights
from sylva_ray.algorithms.registry import ALGORITHMS, create_algorithm
from sylva_ray.algorithms.sylva import Sylva
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.config.experiment import AlgorithmSection
from sylva_ray.federation.context import RoundUploads
from sylva_ray.federation.contract import Algorithm
from tests.algorithms.toys import NOTHING, SMALL, alone, arrive, equal, fleet, method, toy


def test_class_weights_in_their_limits() -> None:
    balanced, skewed = torch.tensor([[5, 5, 5]]), torch.tensor([[100, 10, 0]])
    torch.testing.assert_close(class_weights(balanced, 0.999), torch.ones(1, 3, dtype=torch.float64))
    torch.testing.assert_close(class_weights(skewed, 0.0), torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64))
    near_one = class_weights(skewed, 1 - 1e-9)[0]
    assert near_one[2] == 0
    assert near_one[1] / near_one[0] == pytest.approx(10, rel=1e-4)
    assert class_weights(skewed, 0.999).sum() == pytest.approx(2)


def test_held_out_images_count_as_in_the_loss() -> None:
    counts, labels = np.array([100, 10, 0]), np.array([0, 0, 1, 2])
    for name in ("sylva", "fedavg_at"):
        assert method(name).image_weights(counts, labels).tolist() == [1, 1, 1, 1]
    balanced = Sylva(Sylva.Parameters(class_balance=0.999)).image_weights(counts, labels)
    assert balanced.mean() == pytest.approx(1)
    weights = class_weights(torch.tensor([[100, 10, 1]]), 0.999)[
        0
    ].numpy()  # a class without images counts as one image
    np.testing.assert_allclose(balanced / balanced[0], weights[labels] / weights[0])
    assert Sylva(Sylva.Parameters(class_balance=0.999)).image_weights(counts, labels[:0]).shape == (0,)


@pytest.mark.parametrize("loss", ["ce_adv", "trades", "mart"])
def test_every_loss_exceeds_its_benign_value_and_yields_gradients_per_client(loss: str) -> None:
    context, params, b = toy()
    sylva = Sylva(Sylva.Parameters(loss=loss))
    x_adv = sylva.craft(context, params, b, SMALL)
    assert 0 < (x_adv - b.x).abs().max() <= SMALL.epsilon + 1e-6
    assert not x_adv.requires_grad
    attacked = sylva.sample_losses(context, params, b, x_adv)
    quiet = sylva.sample_losses(context, params, b, sylva.craft(context, params, b, NOTHING))
    assert attacked.mean() > quiet.mean()
    gradients, losses_C = sylva.client_step(context, params, b, SMALL, ["w"])
    assert set(gradients) == {"w"}
    torch.testing.assert_close(losses_C, b.mean_by_client(attacked))


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - {"pm_afl"}))
def test_a_cohorts_gradient_is_each_clients_own(name: str) -> None:
    """Two steps, so that what a method remembers between them is each client's own, too."""
    context, params, b = toy()
    together = method(name)
    for _ in range(2):
        both, losses_C = together.client_step(context, params, b, SMALL, ["w", "b"])
    for client in range(2):
        apart, made = alone(context, params, b, client), method(name)
        for _ in range(2):
            own, loss = made.client_step(*apart, SMALL, ["w", "b"])
        torch.testing.assert_close(losses_C[client], loss[0])
        for leaf, gradient in own.items():
            torch.testing.assert_close(both[leaf][client], gradient[0], rtol=1e-4, atol=1e-6)


def test_benign_weight_and_class_balance_enter_as_written() -> None:
    context, params, b = toy()
    x_adv = Sylva(Sylva.Parameters()).craft(context, params, b, SMALL)
    plain = Sylva(Sylva.Parameters()).sample_losses(context, params, b, x_adv)
    clean = cross_entropy(context.model.forward(params, b.x, b.owner), b.y)
    mixed = Sylva(Sylva.Parameters(benign_weight=0.5)).sample_losses(context, params, b, x_adv)
    torch.testing.assert_close(mixed, plain + 0.5 * clean)
    weighted = Sylva(Sylva.Parameters(class_balance=0.9)).sample_losses(context, params, b, x_adv)
    weights = class_weights(context.class_counts, 0.9)[b.owner, b.y].float()
    torch.testing.assert_close(weighted, plain * weights)
    logits, counts = context.model.forward(params, b.x, b.owner), context.class_counts[b.owner].clamp(min=1)
    for beta, offsets in ((0.9, -class_weights(counts, 0.9).log().float()), (1 - 1e-9, counts.log())):
        refining = Sylva(Sylva.Parameters(class_balance=beta)).refinement_losses(context, params, b)
        torch.testing.assert_close(refining, cross_entropy(logits + offsets, b.y))
    torch.testing.assert_close(Sylva(Sylva.Parameters()).refinement_losses(context, params, b), clean)


@pytest.mark.parametrize("name", ["sylva_paper_like", "undefended"])
@pytest.mark.parametrize("round", [1, 5])
def test_heads_stay_at_home_and_identical_clients_stay_what_they_are(name: str, round: int) -> None:
    made, states = method(name), fleet(4)
    assert set(made.pack(0, states[0])) == {f"{m}.lora_{f}" for m in "mn" for f in "AB"}
    merged = made.aggregate(arrive(made, states, sizes=[10, 20, 30, 40], round=round))
    for before, after in zip(states, merged, strict=True):
        assert np.array_equal(before["head.weight"], after["head.weight"])
        assert not np.array_equal(before["m.lora_B"], after["m.lora_B"])
    twins = [states[0] | {"head.bias": other["head.bias"]} for other in states]
    for before, after in zip(twins, made.aggregate(arrive(made, twins, sizes=[1, 2, 3, 4], round=round)), strict=True):
        assert equal(before, after)


def test_global_sharing_gives_everybody_the_same_bits() -> None:
    made = method("sylva")
    states = fleet(3)
    merged = made.aggregate(arrive(made, states, clients=[0, 2], sizes=[1, 1, 2]))
    assert equal(merged[0], merged[1])
    assert equal(merged[0], merged[2])
    expected = (states[0]["head.bias"] + 2 * states[2]["head.bias"]) / 3
    np.testing.assert_allclose(merged[1]["head.bias"], expected, rtol=1e-6)


def count_merges(made: Algorithm, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The receivers that `merge` was called for, as it goes."""
    merge, receivers = made.merge, []

    def counted(
        uploads: RoundUploads, names: Sequence[str], members: Sequence[int], weights: np.ndarray, receiver: int
    ) -> dict[str, np.ndarray]:
        receivers.append(receiver)
        return merge(uploads, names, members, weights, receiver)

    monkeypatch.setattr(made, "merge", counted)
    return receivers


def test_one_merge_serves_all_in_round_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody is averaged with everybody then; later every neighbourhood is merged by itself."""
    made, states = method("sylva", adapters="neighbours", heads="local"), fleet(9)
    receivers = count_merges(made, monkeypatch)
    first = arrive(made, states, sizes=list(range(10, 100, 10)), round=1)
    merged = made.aggregate(first)
    assert receivers == [0]
    for client, own in enumerate(merged):
        apart = made.merge(first, list(first.by_client[0]), list(range(9)), np.arange(1, 10) / 45, client)
        for module in "mn":
            a, b = f"{module}.lora_A", f"{module}.lora_B"
            np.testing.assert_allclose(own[b] @ own[a], apart[b] @ apart[a], atol=1e-5)
    receivers.clear()
    made.aggregate(arrive(made, states, round=2))
    assert receivers == list(range(9))


@pytest.mark.parametrize(
    ("rule", "shared"), [("krum", True), ("geometric_median", True), ("self_centred_clipping", False)]
)
def test_a_robust_merge_is_shared_by_those_who_received_the_same(
    rule: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates start from what the receiver had; self-centred clipping is centred on every receiver's own upload."""
    made, (start, other, *states) = (
        method("sylva", adapters="neighbours", heads="local", robust={"rule": rule}),
        fleet(8),
    )
    receivers = count_merges(made, monkeypatch)
    made.aggregate(arrive(made, states, received=[start] * 6, round=1))
    assert receivers == ([0] if shared else list(range(6)))
    receivers.clear()
    made.aggregate(arrive(made, states, received=[start] * 5 + [other], round=1))
    assert receivers == ([0, 5] if shared else list(range(6)))


def test_who_sends_nothing_keeps_its_state() -> None:
    made, states = method("sylva", adapters="neighbours", heads="local"), fleet(4)
    merged = made.aggregate(arrive(made, states, clients=[0, 1]))
    assert equal(merged[2], states[2])
    assert equal(merged[3], states[3])
    assert not equal(merged[0], states[0])


def test_registry_builds_every_method_and_methods_of_others() -> None:
    for name in ALGORITHMS:
        assert create_algorithm(AlgorithmSection(name=name)).name == name
    theirs = create_algorithm(AlgorithmSection(name="sylva_ray.algorithms.sylva:Sylva", beta=3))
    assert theirs.parameters.model_dump()["beta"] == 3


def test_merging_gives_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    states, found = fleet(12), []
    for threads in (1, 4):
        monkeypatch.setattr("sylva_ray.aggregation.threads.MERGING_THREADS", threads)
        sylva = method("sylva", adapters="neighbours", heads="local")
        found.append(sylva.aggregate(arrive(sylva, states)))
    assert all(equal(one, other) for one, other in zip(*found, strict=True))
    assert not all(equal(found[0][0], other) for other in found[0]), "receivers differ"

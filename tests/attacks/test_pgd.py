"""Attacks against closed forms, and the promises about bounds and gradients that all of them keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sylva_ray.attacks.losses import (
    boosted_cross_entropy,
    cross_entropy,
    kl_divergence,
    margin,
    true_class_probability,
)
from sylva_ray.attacks.pgd import pgd
from sylva_ray.attacks.registry import attack_stack
from sylva_ray.attacks.state import AttackedModel
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ClientImages, ParameterStack
from sylva_ray.metrics.checks import UNBOUNDED, collapse, is_collapsed, predicts_one_class, unbounded_attack
from tests.attacks.models import LinearBatch


def answers_under(
    model: AttackedModel,
    params: ParameterStack,
    x: torch.Tensor,
    y: torch.Tensor,
    owner: torch.Tensor,
    spec: AttackSpec,
    seed: int = 0,
) -> torch.Tensor:
    return attack_stack(
        model, params, ClientImages(x, y, owner, 2), spec, ImageDraws(torch.arange(len(x)) + 1000 * seed)
    ).predictions


class LinearCohort:
    """A `CohortModel` of two-class linear models: logits (0, w . x + b), one weight vector per client."""

    head_names = ("w", "b")
    precision = torch.float32

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        score = (params["w"][owner] * x.flatten(1)).sum(1) + params["b"][owner]
        return torch.stack([torch.zeros_like(score), score], dim=1)


def batch(n: int = 12, seed: int = 0) -> LinearBatch:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 4, 4, generator=g)
    params = {"w": torch.randn(2, 48, generator=g), "b": torch.tensor([0.1, -0.2])}
    owner = torch.tensor([0] * (n // 2) + [1] * (n - n // 2))
    return params, x, torch.randint(0, 2, (n,), generator=g), owner


def closed_form(
    params: ParameterStack, x: torch.Tensor, y: torch.Tensor, owner: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """The worst image of a linear model: every pixel moves epsilon against its true class."""
    direction = params["w"][owner].sign().view_as(x) * torch.where(y == 1, -1.0, 1.0).view(-1, 1, 1, 1)
    return (x + epsilon * direction).clamp(0, 1)


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_pgd_finds_the_worst_image_of_a_linear_model(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    params, x, y, owner = batch()
    model, spec = LinearCohort(), AttackSpec("pgd", 0.1, 20, 0.02)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = pgd(lambda u: loss(model.forward(params, u, owner), y), x, spec, noise)
    torch.testing.assert_close(found, closed_form(params, x, y, owner, 0.1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", [AttackSpec("fgsm", 0.05, 1, 0.05, False), AttackSpec("pgd", 0.05, 10, 0.02)])
def test_attack_predictions_are_those_of_the_worst_image(spec: AttackSpec) -> None:
    params, x, y, owner = batch(60)
    model = LinearCohort()
    found = answers_under(model, params, x, y, owner, spec)
    worst = model.forward(params, closed_form(params, x, y, owner, 0.05), owner).argmax(1)
    assert torch.equal(found == y, worst == y)
    assert 0 < (found == y).float().mean() < (model.forward(params, x, owner).argmax(1) == y).float().mean()


def test_epsilon_zero_changes_nothing() -> None:
    params, x, y, owner = batch()
    model, spec = LinearCohort(), AttackSpec("pgd", 0.0, 5, 0.0)
    assert torch.equal(
        pgd(lambda u: cross_entropy(model.forward(params, u, owner), y), x, spec, torch.rand(x.shape)), x
    )
    clean = model.forward(params, x, owner).argmax(1)
    assert torch.equal(answers_under(model, params, x, y, owner, spec), clean)


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 1.0])
def test_iterates_stay_in_the_ball_and_in_the_pixel_range_and_touch_no_weight(epsilon: float) -> None:
    params, x, y, owner = batch()
    params = {name: value.requires_grad_() for name, value in params.items()}
    seen = []

    def objective(u: torch.Tensor) -> torch.Tensor:
        seen.append(u.detach())
        return cross_entropy(LinearCohort().forward(params, u, owner), y)

    seen.append(pgd(objective, x, AttackSpec("pgd", epsilon, 7, epsilon / 2), torch.rand(x.shape) * 2 - 1))
    for u in seen:
        assert (u - x).abs().max() <= epsilon + 1e-6
        assert u.min() >= 0
        assert u.max() <= 1
    assert all(value.grad is None for value in params.values())


def test_more_restarts_never_help_the_defender() -> None:
    params, x, y, owner = batch(80, seed=3)
    right = [
        (answers_under(LinearCohort(), params, x, y, owner, AttackSpec("pgd", 0.03, 1, 0.01, True, r)) == y).sum()
        for r in (1, 2, 4)
    ]
    assert right[0] >= right[1] >= right[2]


def test_restarts_begin_elsewhere_without_a_random_start_too() -> None:
    params, x, y, owner = batch(80, seed=3)
    spec = AttackSpec("pgd", 0.03, 1, 0.01, random_start=False)
    once = answers_under(LinearCohort(), params, x, y, owner, spec) == y
    often = answers_under(LinearCohort(), params, x, y, owner, replace(spec, restarts=8)) == y
    assert (once | ~often).all(), "the first run is the same"
    assert often.sum() < once.sum()


def test_a_constant_model_yields_no_nan() -> None:
    params, x, y, owner = batch()
    params = {"w": torch.zeros_like(params["w"]), "b": params["b"]}
    found = pgd(
        lambda u: cross_entropy(LinearCohort().forward(params, u, owner), y), x, AttackSpec("pgd", 0.1, 3, 0.1, False)
    )
    assert torch.equal(found, x)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.0], [-3.0, -2.0, -1.0]])
    y = torch.tensor([0, 0])
    assert margin(logits, y).tolist() == [-2.0, 2.0]  # negative logits must not be masked by zero
    torch.testing.assert_close(true_class_probability(logits, y), logits.softmax(1)[:, 0])
    torch.testing.assert_close(kl_divergence(logits, logits), torch.zeros(2))
    other = logits.flip(0)
    p, q = logits.softmax(1), other.softmax(1)
    torch.testing.assert_close(kl_divergence(logits, other), (p * (p / q).log()).sum(1))
    p = logits.softmax(1)
    expected = -p[:, 0].log() - (1 - p[:, 1:].amax(1)).log()
    torch.testing.assert_close(boosted_cross_entropy(logits, y), expected, atol=2e-3, rtol=0)


def test_s4_passes_a_breakable_model_and_fails_a_constant_one() -> None:
    params, x, y, owner = batch(40)
    model = LinearCohort()
    broken = (answers_under(model, params, x, y, owner, UNBOUNDED) == y).float().mean()
    assert unbounded_attack({0: float(broken)}, 2, [40]).passed
    constant = {"w": torch.zeros_like(params["w"]), "b": torch.ones(2)}
    ones = torch.ones_like(y)
    standing = (answers_under(model, constant, x, ones, owner, UNBOUNDED) == ones).float().mean()
    result = unbounded_attack({0: float(standing)}, 2, [40])
    assert not result.passed
    assert "masked" in result.meaning


def test_s14_marks_a_constant_predictor() -> None:
    assert is_collapsed(0.6, majority_share=0.6, one_class=False)
    assert is_collapsed(0.9, majority_share=0.2, one_class=True)
    assert not is_collapsed(0.61, majority_share=0.6, one_class=False)
    assert not is_collapsed(0.5, majority_share=1.0, one_class=False), "it is tested on one class"
    assert predicts_one_class(torch.tensor([1, 1]).numpy(), torch.tensor([0, 1]).numpy())
    assert not predicts_one_class(torch.tensor([1, 1]).numpy(), torch.tensor([1, 1]).numpy())
    result = collapse([False, True])
    assert not result.passed
    assert "1 of 2" in result.meaning
    assert collapse([False]).passed
    assert "1 of 4" in collapse([True, False, False, False, False], left_out=[3]).meaning


def test_boosted_cross_entropy_pulls_on_what_is_confidently_wrong() -> None:
    """Taken from the probability, its logarithm's guard would swallow the gradient here."""
    logits = torch.tensor([[-60.0, 60.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(boosted_cross_entropy(logits, torch.tensor([0])).sum(), logits)
    assert float(gradient[0, 0]) == pytest.approx(-1, abs=1e-3)

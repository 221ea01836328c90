"""A model whose logits or gradients are NaN earns nothing by it: such an answer is wrong, and the attack goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sylva_ray.attacks.registry import attack_stack
from sylva_ray.attacks.state import NO_ANSWER, predicted_classes
from sylva_ray.config.attacks import parse_attack
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import ClientImages, ParameterStack
from sylva_ray.metrics.smoothing import votes
from tests.attacks.models import LinearCohort, gap, linear_batch

IMAGES = 40


class Broken(LinearCohort):
    """The logit of class 0 is NaN for all images of client 0."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        logits = super().forward(params, x, owner)
        logits[owner == 0, 0] = float("nan")
        return logits


class OnePixelWithoutGradient(LinearCohort):
    """The logits of `LinearCohort` without its first pixel, whose derivative is NaN."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        without = x.clone()
        without[:, 0, 0, 0] = 0.5 + torch.sqrt(0 * x[:, 0, 0, 0])
        return super().forward(params, without, owner)


class WithoutOnePixel(LinearCohort):
    """The same logits, differentiable."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        without = x.clone()
        without[:, 0, 0, 0] = 0.5
        return super().forward(params, without, owner)


def test_the_class_of_logits_by_hand() -> None:
    nan = float("nan")
    logits = torch.tensor([[0.0, 2.0, 1.0], [nan, 2, 1], [0, 2, nan], [nan, nan, nan], [0, torch.inf, 1]])
    assert predicted_classes(logits).tolist() == [1, NO_ANSWER, NO_ANSWER, NO_ANSWER, 1]


@pytest.mark.parametrize("name", ["pgd", "apgd", "square", "fgsm"])
def test_an_answer_without_number_is_wrong_whatever_the_label(name: str) -> None:
    params, x, _, owner = linear_batch(n=IMAGES)
    images = ClientImages(x, torch.zeros(IMAGES, dtype=torch.int64), owner, 2)
    spec = parse_attack(f"{name}:epsilon=0")
    predictions = attack_stack(Broken(), params, images, spec, ImageDraws(torch.arange(IMAGES))).predictions
    assert (predictions[owner == 0] == NO_ANSWER).all()
    assert (predictions[owner == 1] != NO_ANSWER).all()


def test_a_certificate_needs_answers() -> None:
    params, x, _, owner = linear_batch(n=IMAGES)
    images = ClientImages(x, torch.zeros(IMAGES, dtype=torch.int64), owner, 2)
    guess, hits = votes(Broken(), params, images, 0.1, 50, ImageDraws(torch.arange(IMAGES)))
    assert (guess[owner == 0] == 2).all(), "none of the two classes"
    assert (hits[owner == 0] == 0).all()
    assert (hits[owner == 1] > 10).all()


class InfiniteGradient(LinearCohort):
    """The logits of `LinearCohort`; the derivative of the first pixel, a power at 0, is infinite."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        power = x[:, 0, 0, 0] ** 0.5
        return super().forward(params, x, owner) + (power - power.detach())[:, None] * torch.tensor([1.0, -1.0])


ATTACKS_BY_GRADIENT = [
    "pgd:epsilon=0.01", "pgd:norm=l2,epsilon=0.05", "mim:epsilon=0.01", "apgd:norm=l2,epsilon=0.05", "fab", "deepfool",
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS_BY_GRADIENT)
def test_an_infinite_gradient_of_one_pixel_does_not_stop_an_attack(attack: str) -> None:
    params, x, _, owner = linear_batch(n=IMAGES)
    x[:, 0, 0, 0] = 0
    y = LinearCohort().forward(params, x, owner).argmax(1)
    images, draws = ClientImages(x, y, owner, 2), ImageDraws(torch.arange(IMAGES))
    spec = replace(parse_attack(attack), random_start=False)
    expected = (attack_stack(LinearCohort(), params, images, spec, draws).predictions != y).float().mean()
    broken = (attack_stack(InfiniteGradient(), params, images, spec, draws).predictions != y).float().mean()
    assert expected > 0.1
    assert broken >= 0.5 * expected  # the pixel may move the wrong way


class Sure(LinearCohort):
    """Logits of a size at which the gradient of the cross-entropy is 1e-13 and less, and its square underflows."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return 50 * super().forward(params, x, owner)


@pytest.mark.parametrize("attack", ["pgd:norm=l2,epsilon=0.5", "apgd:norm=l2,epsilon=0.5", "mim:norm=l2,epsilon=0.5"])
def test_a_small_gradient_has_a_direction(attack: str) -> None:
    params, x, y, owner = linear_batch(n=IMAGES)
    images, draws = ClientImages(x, y, owner, 2), ImageDraws(torch.arange(IMAGES))
    spec = replace(parse_attack(attack), random_start=False)
    lead, weights = gap(params, x, y, owner)
    reachable = lead < 0.5 * 0.9 * weights.norm(dim=1)  # clearly, and where the gradient itself does not underflow
    seen = reachable & (50 * lead < 50)
    assert (50 * lead[seen] > 30).float().mean() > 0.1
    broken = attack_stack(Sure(), params, images, spec, draws).predictions != y
    assert broken[seen].float().mean() > 0.95  # the gradient may underflow at a start of APGD


@pytest.mark.parametrize("attack", ATTACKS_BY_GRADIENT)
def test_pixels_whose_gradient_is_nan_do_not_stop_an_attack(attack: str) -> None:
    params, x, _, owner = linear_batch(n=IMAGES)
    y = WithoutOnePixel().forward(params, x, owner).argmax(1)
    images, draws = ClientImages(x, y, owner, 2), ImageDraws(torch.arange(IMAGES))
    spec = parse_attack(attack)
    expected = attack_stack(WithoutOnePixel(), params, images, spec, draws).predictions
    assert (expected != y).float().mean() > 0.1
    assert torch.equal(attack_stack(OnePixelWithoutGradient(), params, images, spec, draws).predictions, expected)

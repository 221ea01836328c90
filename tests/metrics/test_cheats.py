"""Planted cheats: models that look robust and are not. Every one of them must be caught; an honest model must pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sylva_ray.attacks.registry import attack_stack
from sylva_ray.attacks.state import AttackedModel
from sylva_ray.core.seeding import ImageDraws, image_keys
from sylva_ray.core.summary import CheckResult
from sylva_ray.core.types import ClientImages, ParameterStack
from sylva_ray.evaluation.plan import check_attacks, epsilon_curve, steps_curve
from sylva_ray.evaluation.run_checks import RunFacts, run_checks
from sylva_ray.evaluation.tables import Measured
from sylva_ray.metrics.probe import binarization_test, gradient_health
from tests.attacks.models import LinearCohort, WavyCohort, linear_batch

EPSILON, CLASSES, IMAGES = 8 / 255, 5, 48
THREAT = {"norm": "linf", "evaluation": "pgd", "knowledge": "weights", "precision": "float32"}


class Quantised(WavyCohort):
    """Rounds its input to 16 levels, through which no gradient passes."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return super().forward(params, torch.round(x * 15) / 15, owner)


class Randomised(WavyCohort):
    """Adds noise at inference."""

    def __init__(self) -> None:
        self.noise = torch.Generator().manual_seed(0)

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return super().forward(params, x + 0.15 * torch.randn(x.shape, generator=self.noise), owner)


class Detached(WavyCohort):
    """Answers honestly and cuts the gradient off."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return super().forward(params, x.detach(), owner)


class BrokenGradient(WavyCohort):
    """Answers honestly; the gradient is NaN, because sqrt is differentiated at zero."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        zero = torch.sqrt(0 * x.flatten(1).sum(1, keepdim=True))
        return super().forward(params, x, owner) + zero


class InfiniteGradient(WavyCohort):
    """Answers honestly; the gradient of one pixel is infinite, as behind a gamma correction of black."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        power = (x[:, 0, 0, 0] - x[:, 0, 0, 0].detach()) ** 0.5
        return super().forward(params, x, owner) + power[:, None] * torch.arange(CLASSES)


class Constant(WavyCohort):
    """Always the same answer; a little of the image remains, so that a gradient is there."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(CLASSES)
        bias[0] = 100
        return 1e-3 * super().forward(params, x, owner) + bias


class Probabilities(WavyCohort):
    """Says softmax where logits are due, and is so sure of itself that nothing is left of the gradient."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return torch.softmax(60 * super().forward(params, x, owner), 1)


def checked(model: AttackedModel, honest_labels: bool = True) -> dict[str, CheckResult]:
    """What `sylva-ray evaluate --checks` would say of a fleet of two such clients."""
    params, x, _, owner = linear_batch(num_classes=CLASSES, n=IMAGES, spread=0.3)
    params["w"] = params["w"] * 0.6
    y = WavyCohort().forward(params, x, owner).argmax(1)
    if not honest_labels:
        y = torch.where(torch.arange(IMAGES) % 3 > 0, 0, y)  # a skewed client, mostly class 0
    images = ClientImages(x, y, owner, 2)
    measured = Measured(images.split_by_client(y))
    with torch.no_grad():
        measured.answers["benign"] = images.split_by_client(model.forward(params, x, owner).argmax(1))
    specs = [*epsilon_curve(), *steps_curve(EPSILON), *check_attacks(EPSILON, CLASSES).values()]
    for spec in {spec.label: spec for spec in specs}.values():
        draws = ImageDraws(image_keys(0, spec.label, 0, np.arange(IMAGES)))
        measured.answers[spec.label] = images.split_by_client(
            attack_stack(model, params, images, spec, draws).predictions
        )
    attack = check_attacks(EPSILON, CLASSES)["pgd"]
    draws = ImageDraws(image_keys(0, "probe", 0, np.arange(IMAGES)))
    values = gradient_health(model, params, images, attack, draws)
    values |= binarization_test(model, params, images, attack, draws)
    probes = {name: float(v.max() if name == "difference" else v.mean()) for name, v in values.items()}
    majority = [np.bincount(own).max() / len(own) for own in measured.labels]
    worst = [own.mean() for own in measured.correct(attack.label)]
    collapsed = [bool(w <= m) for w, m in zip(worst, majority, strict=True)]
    facts = RunFacts(EPSILON, CLASSES, THREAT, images=5000, exported=3, collapsed=collapsed)
    results = run_checks(measured, probes, facts)
    assert [check.name for check in results] == [f"S{number}" for number in range(1, 15)]
    return {check.name: check for check in results}


def failed(results: dict[str, CheckResult]) -> set[str]:
    return {name for name, check in results.items() if not check.passed}


def test_an_honest_model_passes_what_is_about_honesty() -> None:
    results = checked(WavyCohort())
    assert failed(results) <= {"S5", "S7", "S14"}, {n: results[n].meaning for n in failed(results)}


@pytest.mark.parametrize(
    ("model", "caught_by"),
    [
        (Quantised, {"S10", "S8"}),
        (Randomised, {"S2", "S10"}),
        (Detached, {"S8", "S10", "S13"}),
        (Probabilities, {"S10"}),
        (InfiniteGradient, {"S10"}),
        (BrokenGradient, {"S8", "S10", "S13"}),
    ],
)
def test_a_cheat_is_caught(model: type[LinearCohort], caught_by: set[str]) -> None:
    results = checked(model())
    assert caught_by <= failed(results), {name: (check.value, check.meaning) for name, check in results.items()}
    for name in failed(results):
        assert results[name].meaning


def test_a_constant_answer_is_caught() -> None:
    results = checked(Constant(), honest_labels=False)
    assert {"S4", "S14"} <= failed(results)


def test_planted_points_are_there_and_the_attack_finds_them() -> None:
    params, x, y, owner = linear_batch(num_classes=CLASSES, n=IMAGES)
    images = ClientImages(x, y, owner, 2)
    attack = check_attacks(EPSILON, CLASSES)["pgd"]
    draws = ImageDraws(torch.arange(IMAGES))
    honest = binarization_test(WavyCohort(), params, images, attack, draws)
    assert honest["planted"].mean() > 0.9
    assert honest["found"].sum() >= 0.95 * honest["planted"].sum()
    blind = binarization_test(Detached(), params, images, attack, draws)
    assert torch.equal(blind["planted"], honest["planted"])
    assert blind["found"].mean() < 0.5, "what is found without a gradient is luck"

"""Measurements behind the checks: is the gradient alive, is the answer a function, does the attack find what is surely
there.

They see a `CohortModel` and nothing else, so that a model which cheats in any way behind that seam can be held up to
them.
"""

from __future__ import annotations

import torch

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.norms import LINF
from sylva_ray.attacks.pgd import pgd
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.models.cohort import CohortModel

PASSES = 5
"""Forwards of the same images that must agree."""

PLANTED = 64
"""Random points at the border of the ball, one of which is declared adversarial, and as many inside it that are not."""

INSIDE = 0.5
"""Share of epsilon within which the points that must not be adversarial lie."""


def gradient_health(
    model: CohortModel,
    params: ParameterStack,
    x: torch.Tensor,
    y: torch.Tensor,
    owner: torch.Tensor,
    spec: AttackSpec,
    draws: ImageDraws,
) -> dict[str, torch.Tensor]:
    """Of every image, ``[N]`` float each.

    ``zero_gradient``: 1 where the loss has no gradient at all; ``rises``: 1 where the loss is not smaller after
    ``spec`` than before it; ``difference``: largest difference between logits of `PASSES` forwards; ``probabilities``:
    1 where the "logits" are non-negative and sum to 1.
    """
    logits = model.forward(params, x, owner)
    first, gradient = loss_gradient(model, params, x, y, owner)
    noise = LINF.inside(x, draws, 0)
    moved = pgd(lambda u: _with_path(_loss(model, params, u, y, owner), u), x, spec, noise)
    with torch.no_grad():
        last = cross_entropy(model.forward(params, moved, owner), y)
        again = [model.forward(params, x, owner) for _ in range(PASSES)]
    spread = torch.stack([(other - logits.detach()).abs().amax(1) for other in again]).amax(0)
    is_distribution = (logits.detach() >= 0).all(1) & ((logits.detach().sum(1) - 1).abs() < 1e-4)
    return {
        "zero_gradient": (gradient.flatten(1).abs().amax(1) == 0).float(),
        "rises": (last > first - 1e-6).float(),
        "difference": spread.float(),
        "probabilities": is_distribution.float(),
    }


def loss_gradient(
    model: CohortModel, params: ParameterStack, x: torch.Tensor, y: torch.Tensor, owner: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy ``[N]`` and its gradient ``[N, 3, H, W]``: zero where the model has cut it off."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        loss = _loss(model, params, leaf, y, owner)
        if not loss.requires_grad:
            return loss.detach(), torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(x) if gradient is None else gradient


def binarization_test(
    model: CohortModel,
    params: ParameterStack,
    x: torch.Tensor,
    owner: torch.Tensor,
    spec: AttackSpec,
    draws: ImageDraws,
) -> dict[str, torch.Tensor]:
    """Run S13: an attack must find an adversarial point that is known to exist.

    The test is that of Zimmermann et al. (2022, "Increasing Confidence in Adversarial Robustness Evaluations"). On top
    of every image's logits sits a binary read-out d . z, d the direction in which one of `PLANTED` random corners of
    the ball is furthest from the points inside; its threshold lies half way between that corner and the highest of the
    image itself and points within `INSIDE` epsilon. So the corner is adversarial, by construction.

    Returns:
        ``[N]`` float each: ``planted`` (1 where such a corner exists: the read-out separates it), ``found`` (the attack
        got above the threshold), ``by_chance`` (random search got above it with as many corners as the attack has
        steps).
    """
    with torch.no_grad():
        clean = model.forward(params, x, owner)
        inner, corners = [clean], []
        for point in range(PLANTED):
            inside = (x + INSIDE * spec.epsilon * LINF.inside(x, draws, 2 * point)).clamp(0, 1)
            inner.append(model.forward(params, inside, owner))
            corner = (x + spec.epsilon * LINF.inside(x, draws, 2 * point + 1).sign()).clamp(0, 1)
            corners.append(model.forward(params, corner, owner))
        inner_z, corner_z = torch.stack(inner, 1), torch.stack(corners, 1)  # [N, m, num_classes]
        centre = inner_z.mean(1)
        furthest = (corner_z - centre[:, None]).norm(dim=2).argmax(1)
        chosen = corner_z[torch.arange(len(x)), furthest]
        direction = torch.nn.functional.normalize(chosen - centre, dim=1)
        highest_inside = (inner_z * direction[:, None]).sum(2).amax(1)
        top = (chosen * direction).sum(1)
        threshold = (top + highest_inside) / 2
        is_planted = top > highest_inside + 1e-6 * top.abs()
        by_attack = (clean * direction).sum(1) > threshold
        by_random_search = by_attack.clone()
        for trial in range(spec.steps):
            corner = (x + spec.epsilon * LINF.inside(x, draws, 2 * PLANTED + trial).sign()).clamp(0, 1)
            by_random_search |= (model.forward(params, corner, owner) * direction).sum(1) > threshold

    def above(u: torch.Tensor) -> torch.Tensor:
        nonlocal by_attack
        score = (model.forward(params, u, owner) * direction).sum(1) - threshold
        by_attack = by_attack | (score.detach() > 0)
        return _with_path(score, u)

    moved = pgd(above, x, spec, LINF.inside(x, draws, 3 * PLANTED + spec.steps))
    with torch.no_grad():
        above(moved)
    return {
        "planted": is_planted.float(),
        "found": (by_attack & is_planted).float(),
        "by_chance": (by_random_search & is_planted).float(),
    }


def _with_path(values: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The same values; where the model has cut the gradient off, one of zeros, so that an attack can run and fail."""
    return values if values.requires_grad else values + 0 * u.flatten(1).sum(1)


def _loss(
    model: CohortModel, params: ParameterStack, u: torch.Tensor, y: torch.Tensor, owner: torch.Tensor
) -> torch.Tensor:
    return cross_entropy(model.forward(params, u, owner), y)

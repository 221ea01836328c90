"""Measurements for the checks S10 and S13: gradients, randomness of the model, and the binarization test.

They access models only through `AttackedModel`, as attacks do.
"""

from __future__ import annotations

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.norms import LINF
from sylva_ray.attacks.pgd import pgd
from sylva_ray.attacks.state import AttackedModel
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ClientImages, ParameterStack

PASSES = 5
"""Number of forwards of the same images that are compared."""

NUM_POINTS = 64
"""Number of random corners of the ball, one of which becomes adversarial, and of random inner points."""

INNER_RADIUS = 0.5
"""Radius of the ball of the inner points, as a fraction of epsilon."""


def gradient_health(
    model: AttackedModel, params: ParameterStack, images: ClientImages, spec: AttackSpec, draws: ImageDraws
) -> dict[str, torch.Tensor]:
    """Measure for check S10 whether gradients are useful to an attack.

    Args:
        model: the stack of models.
        params: the parameters of the C clients.
        images: N images of the C clients.
        spec: PGD under L-infinity; epsilon and step size are in pixel units.
        draws: random numbers of the N images, for the attack's start.

    Returns:
        ``[N]`` float each: ``zero_gradient`` (1 where the gradient of the loss is exactly zero, or not finite),
        ``rises`` (1 where the loss after the attack is at least that before it), ``difference`` (the largest difference
        between the logits of `PASSES` forwards), ``probabilities`` (1 where the logits are non-negative and sum to 1).
    """
    x, y, owner = images.x, images.y, images.owner
    logits = model.forward(params, x, owner)
    loss_before, gradient = loss_gradient(model, params, images)
    noise = LINF.inside(x, draws, 0)
    x_adv = pgd(lambda u: _differentiable(_loss(model, params, u, images), u), x, spec, noise)
    with torch.no_grad():
        loss_after = cross_entropy(model.forward(params, x_adv, owner), y)
        repeated = [model.forward(params, x, owner) for _ in range(PASSES)]
    difference = torch.stack([(other - logits.detach()).abs().amax(1) for other in repeated]).amax(0)
    is_distribution = (logits.detach() >= 0).all(1) & ((logits.detach().sum(1) - 1).abs() < 1e-4)
    return {
        "zero_gradient": (~gradient.isfinite().flatten(1).all(1) | (gradient == 0).flatten(1).all(1)).float(),
        "rises": (loss_after > loss_before - 1e-6).float(),
        "difference": difference.float(),
        "probabilities": is_distribution.float(),
    }


def loss_gradient(
    model: AttackedModel, params: ParameterStack, images: ClientImages
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy ``[N]`` and its gradient ``[N, 3, H, W]``, zero if the model is not differentiable."""
    with torch.enable_grad():
        leaf = images.x.detach().requires_grad_()
        loss = _loss(model, params, leaf, images)
        if not loss.requires_grad:
            return loss.detach(), torch.zeros_like(images.x)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(images.x) if gradient is None else gradient


def binarization_test(
    model: AttackedModel, params: ParameterStack, images: ClientImages, spec: AttackSpec, draws: ImageDraws
) -> dict[str, torch.Tensor]:
    """Measure for check S13 whether the attack finds an adversarial point that is known to exist.

    This is the test of Zimmermann et al. (2022, "Increasing Confidence in Adversarial Robustness Evaluations"). A
    binary classifier d . z > threshold is put on the logits z of every image. The direction d points from the mean of
    the inner points (the image and `NUM_POINTS` random points of radius `INNER_RADIUS` epsilon) to the most distant
    of `NUM_POINTS` random corners of the ball. The threshold is half-way between that corner and the largest d . z of
    the inner points, so that the corner is adversarial by construction.

    Args:
        model: the stack of models.
        params: the parameters of the C clients.
        images: N images of the C clients; the labels are not used.
        spec: PGD under L-infinity; epsilon, the radius of the ball, and step size are in pixel units.
        draws: random numbers of the N images, for points and the attack's start.

    Returns:
        ``[N]`` float each: ``planted`` (1 where the classifier separates the corner from the inner points), ``found``
        (1 where the attack exceeded the threshold), ``by_chance`` (1 where random search exceeded it, with as many
        corners as the attack has steps).
    """
    x, owner = images.x, images.owner
    with torch.no_grad():
        clean = model.forward(params, x, owner)
        inner, corners = [clean], []
        for point in range(NUM_POINTS):
            inner_point = (x + INNER_RADIUS * spec.epsilon * LINF.inside(x, draws, 2 * point)).clamp(0, 1)
            inner.append(model.forward(params, inner_point, owner))
            corner = (x + spec.epsilon * LINF.inside(x, draws, 2 * point + 1).sign()).clamp(0, 1)
            corners.append(model.forward(params, corner, owner))
        inner_z, corner_z = torch.stack(inner, 1), torch.stack(corners, 1)  # [N, m, num_classes]
        centre = inner_z.mean(1)
        furthest = (corner_z - centre[:, None]).norm(dim=2).argmax(1)
        chosen = corner_z[torch.arange(len(x)), furthest]
        direction = torch.nn.functional.normalize(chosen - centre, dim=1)
        inner_score = (inner_z * direction[:, None]).sum(2).amax(1)
        corner_score = (chosen * direction).sum(1)
        threshold = (corner_score + inner_score) / 2
        is_planted = corner_score > inner_score + 1e-6 * corner_score.abs()
        by_attack = (clean * direction).sum(1) > threshold
        by_random_search = by_attack.clone()
        for trial in range(spec.steps):
            corner = (x + spec.epsilon * LINF.inside(x, draws, 2 * NUM_POINTS + trial).sign()).clamp(0, 1)
            by_random_search |= (model.forward(params, corner, owner) * direction).sum(1) > threshold

    def score(u: torch.Tensor) -> torch.Tensor:
        nonlocal by_attack
        excess = (model.forward(params, u, owner) * direction).sum(1) - threshold
        by_attack = by_attack | (excess.detach() > 0)
        return _differentiable(excess, u)

    x_adv = pgd(score, x, spec, LINF.inside(x, draws, 3 * NUM_POINTS + spec.steps))
    with torch.no_grad():
        score(x_adv)
    return {
        "planted": is_planted.float(),
        "found": (by_attack & is_planted).float(),
        "by_chance": (by_random_search & is_planted).float(),
    }


def _differentiable(values: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return the values, with a gradient of zero if they do not depend on ``u``, so that an attack can run."""
    return values if values.requires_grad else values + 0 * u.flatten(1).sum(1)


def _loss(model: AttackedModel, params: ParameterStack, u: torch.Tensor, images: ClientImages) -> torch.Tensor:
    return cross_entropy(model.forward(params, u, images.owner), images.y)

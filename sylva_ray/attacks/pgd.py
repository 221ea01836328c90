"""L-infinity attacks in [0, 1] pixel space, on a stack of clients at once.

Projected gradient descent (Madry et al. 2018); FGSM (Goodfellow et al. 2015) is its single full step. In the inner loop
only the gradient with respect to the input is taken: nothing here needs a weight gradient, and none is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sylva_ray.attacks.losses import cross_entropy, margin
from sylva_ray.models.cohort import CohortModel
from sylva_ray.types import AttackSpec, ParameterStack

Objective = Callable[[torch.Tensor], torch.Tensor]
"""``x [N, 3, H, W] -> [N]``, summed (never averaged: half precision would lose small gradients) before the gradient."""


def project(u: torch.Tensor, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Onto the L-infinity ball of radius epsilon around ``x``, then onto the pixel range [0, 1]."""
    return torch.minimum(torch.maximum(u, x - epsilon), x + epsilon).clamp(0, 1)


def start(x: torch.Tensor, spec: AttackSpec, noise: torch.Tensor | None) -> torch.Tensor:
    """The attack's first point; ``noise`` is uniform in [-1, 1] with the shape of ``x``."""
    if not spec.random_start or spec.epsilon == 0:
        return x.detach()
    assert noise is not None, "a random start needs noise drawn by the caller"
    return project(x + spec.epsilon * noise, x, spec.epsilon).detach()


def pgd(objective: Objective, x: torch.Tensor, spec: AttackSpec, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Maximise ``objective`` within ``spec.epsilon`` of ``x``; the last iterate is returned, without a graph."""
    x_adv = start(x, spec, noise)
    for _ in range(spec.steps if spec.epsilon > 0 else 0):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(x_adv).sum(), x_adv)
        x_adv = project(x_adv.detach() + spec.step_size * gradient.sign(), x, spec.epsilon)
    return x_adv


EVALUATION_LOSSES = {"ce": cross_entropy, "margin": margin}


def attack_predictions(
    model: CohortModel,
    params: ParameterStack,
    x: torch.Tensor,
    labels: torch.Tensor,
    owner: torch.Tensor,
    spec: AttackSpec,
    noises: Sequence[torch.Tensor],
) -> torch.Tensor:
    """What each image's model answers in the worst case found, ``[N]``: a wrong class where the attack won.

    Every iterate counts, the clean image and all ``spec.restarts`` included, and an image that has fallen leaves the batch.
    So the robust accuracy is never above the benign one, and never above that of the last iterate alone.

    Args:
        model, params, owner: the cohort; ``owner`` sorted, on the CPU.
        x, labels: ``[N, 3, H, W] in [0, 1]`` and ``[N]``.
        noises: one uniform [-1, 1] tensor like ``x`` per restart (ignored without random start).
    """
    loss = EVALUATION_LOSSES[spec.loss]
    predictions = labels.clone()
    with torch.no_grad():
        clean = model.forward(params, x, owner).argmax(1)
    predictions[clean != labels] = clean[clean != labels]
    alive = (clean == labels).nonzero()[:, 0]
    for restart in range(spec.restarts if spec.epsilon > 0 else 0):
        x_adv = start(x, spec, noises[restart] if spec.random_start else None)[alive]
        for step in range(spec.steps + 1):
            if len(alive) == 0:
                return predictions
            is_last = step == spec.steps
            with torch.set_grad_enabled(not is_last):
                x_adv = x_adv.detach().requires_grad_(not is_last)
                logits = model.forward(params, x_adv, owner[alive.cpu()])
            answers = logits.argmax(1)
            standing = answers == labels[alive]
            predictions[alive[~standing]] = answers[~standing]
            if not is_last:
                (gradient,) = torch.autograd.grad(loss(logits, labels[alive]).sum(), x_adv)
                moved = project(x_adv.detach() + spec.step_size * gradient.sign(), x[alive], spec.epsilon)
                x_adv = moved[standing]
            alive = alive[standing]
    return predictions

"""The attack that training defends against: projected gradient descent (Madry et al. 2018) in L-infinity, on any objective.

Only the gradient with respect to the input is taken: the inner loop needs no weight gradient, and makes none. Evaluation has
attacks of its own, in which every iterate counts (`sylva_ray.attacks.registry`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sylva_ray.attacks.norms import LINF
from sylva_ray.core.types import AttackSpec

Objective = Callable[[torch.Tensor], torch.Tensor]
"""``x [N, 3, H, W] -> [N]``, summed (never averaged: half precision would lose small gradients) before the gradient."""


def start(x: torch.Tensor, spec: AttackSpec, noise: torch.Tensor | None) -> torch.Tensor:
    """The attack's first point; ``noise`` is uniform in [-1, 1] with the shape of ``x``."""
    if not spec.random_start or spec.epsilon == 0:
        return x.detach()
    assert noise is not None, "a random start needs noise drawn by the caller"
    return LINF.project(x + spec.epsilon * noise, x, spec.epsilon).detach()


def pgd(objective: Objective, x: torch.Tensor, spec: AttackSpec, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Maximise ``objective`` within ``spec.epsilon`` of ``x``; the last iterate is returned, without a graph."""
    x_adv = start(x, spec, noise)
    for _ in range(spec.steps if spec.epsilon > 0 else 0):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(x_adv).sum(), x_adv)
        x_adv = LINF.project(x_adv.detach() + spec.step_size * gradient.sign(), x, spec.epsilon)
    return x_adv

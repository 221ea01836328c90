"""The loop that FGSM, PGD, MIM and the margin attack share: steps of a fixed size along the gradient."""

from __future__ import annotations

from sylva_ray.attacks.losses import cross_entropy, margin
from sylva_ray.attacks.norms import NORMS
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

LOSSES = {"ce": cross_entropy, "margin": margin}


def gradient_attack(state: AttackState, spec: AttackSpec, draws: ImageDraws, decay: float = 0.0) -> None:
    """Take ``spec.steps`` steps along the steepest direction of the norm, ``spec.restarts`` times.

    Args:
        decay: above 0, the direction is that of a running sum of gradients, which decays by this factor per step.
    """
    norm, loss = NORMS[spec.norm], LOSSES[spec.loss]
    for restart in range(spec.restarts):
        rows = state.remaining()
        if not len(rows):
            return
        x_adv = state.x[rows]
        if spec.random_start:
            noise = norm.inside(x_adv, draws.of(rows), restart)
            x_adv = norm.project(x_adv + spec.epsilon * noise, x_adv, spec.epsilon)
        momentum = torch.zeros_like(x_adv)
        for _ in range(spec.steps):
            _, gradient, _ = state.gradient(x_adv, rows, lambda logits, rows: loss(logits, state.y[rows]))
            if decay:
                mean = gradient.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
                gradient = momentum = decay * momentum + gradient / (mean + 1e-12)
            x_adv = norm.project(x_adv + spec.step_size * norm.ascent(gradient), state.x[rows], spec.epsilon)
            keep = state.is_robust[rows]
            rows, x_adv, momentum = rows[keep], x_adv[keep], momentum[keep]
            if not len(rows):
                break
        else:
            with state.exact():  # the last point of all, as the model's own precision sees it
                state.logits(x_adv, rows)

"""The loop of FGSM, PGD, MIM and CW: steps of a fixed size along the gradient."""

from __future__ import annotations

from sylva_ray.attacks.losses import cross_entropy, margin
from sylva_ray.attacks.norms import NORMS, TINY, scaled_to_one
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

LOSSES = {"ce": cross_entropy, "margin": margin}
"""The losses of these attacks by name."""


def gradient_attack(state: AttackState, spec: AttackSpec, draws: ImageDraws, decay: float = 0.0) -> None:
    """Take ``spec.steps`` steps in the direction of steepest ascent of the norm, ``spec.restarts`` times.

    Without a random start the first run begins at the image; the others would repeat it, and begin at random points.

    Args:
        state: the images and the model; records every success.
        spec: the attack.
        draws: the source of the random starts.
        decay: momentum factor. If it is positive, the direction is that of a decaying sum of normalised gradients
            (equation 6 of Dong et al. 2018); 0: no momentum.
    """
    norm, loss = NORMS[spec.norm], LOSSES[spec.loss]
    for restart in range(spec.restarts):
        rows = state.remaining()
        if not len(rows):
            return
        x_adv = state.x[rows]
        if spec.random_start or restart > 0:
            noise = norm.inside(x_adv, draws.select(rows), restart)
            x_adv = norm.project(x_adv + spec.epsilon * noise, x_adv, spec.epsilon)
        momentum = torch.zeros_like(x_adv)
        for _ in range(spec.steps):
            _, gradient, _ = state.gradient(x_adv, rows, lambda logits, rows: loss(logits, state.y[rows]))
            if decay:
                gradient = scaled_to_one(gradient)
                mean = gradient.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
                gradient = momentum = decay * momentum + gradient / (mean + TINY)
            x_adv = norm.project(x_adv + spec.step_size * norm.ascent(gradient), state.x[rows], spec.epsilon)
            keep = state.is_robust[rows]
            rows, x_adv, momentum = rows[keep], x_adv[keep], momentum[keep]
            if not len(rows):
                break
        else:
            with state.at_model_precision():  # no gradient is taken at the last point
                state.logits(x_adv, rows)

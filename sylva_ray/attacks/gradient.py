"""Attacks with a fixed step along the gradient: FGSM, PGD, MIM, the margin attack; and noise, which follows nothing.

FGSM (Goodfellow et al. 2015) is one full step of PGD (Madry et al. 2018); MIM (Dong et al. 2018) follows a running mean of
gradients; "CW-Linf" is PGD on the margin of Carlini and Wagner (2017, kappa 0).
"""

from __future__ import annotations

import torch

from sylva_ray.attacks.losses import cross_entropy, margin
from sylva_ray.attacks.norms import NORMS
from sylva_ray.attacks.state import Objective, Search
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

LOSSES = {"ce": cross_entropy, "margin": margin}


def objective_of(search: Search, name: str) -> Objective:
    """An untargeted loss against the images' own labels."""
    return lambda logits, rows: LOSSES[name](logits, search.y[rows])


def descend(search: Search, spec: AttackSpec, draws: ImageDraws) -> None:
    """``spec.restarts`` times ``spec.steps`` steps, each along the steepest direction of the norm."""
    norm, objective = NORMS[spec.norm], objective_of(search, spec.loss)
    decay = spec.option("decay", 0.0)
    for restart in range(spec.restarts):
        rows = search.alive()
        if not len(rows):
            return
        x_adv = search.x[rows]
        if spec.random_start:
            noise = norm.inside(x_adv, draws.of(rows), restart)
            x_adv = norm.project(x_adv + spec.epsilon * noise, x_adv, spec.epsilon)
        momentum = torch.zeros_like(x_adv)
        for _ in range(spec.steps):
            _, gradient, _ = search.gradient(x_adv, rows, objective)
            if decay:
                mean = gradient.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
                gradient = momentum = decay * momentum + gradient / (mean + 1e-12)
            x_adv = norm.project(x_adv + spec.step_size * norm.ascent(gradient), search.x[rows], spec.epsilon)
            keep = search.stands[rows]
            rows, x_adv, momentum = rows[keep], x_adv[keep], momentum[keep]
            if not len(rows):
                break
        else:
            search.logits(x_adv, rows)


def noise(search: Search, spec: AttackSpec, draws: ImageDraws) -> None:
    """``spec.steps`` uniform points of the ball: what an attack has to be better than.

    No gradient makes up for a success that bfloat16 overlooks, so answers are those of the model's own precision."""
    norm = NORMS[spec.norm]
    with search.exact():
        for turn in range(spec.steps):
            rows = search.alive()
            if not len(rows):
                return
            x = search.x[rows]
            search.logits(norm.project(x + spec.epsilon * norm.inside(x, draws.of(rows), turn), x, spec.epsilon), rows)

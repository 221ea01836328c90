"""Adversarial training losses per image, and class-balanced weights: the parts that methods are assembled from."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sylva_ray.algorithms.base import Batch, Cohort
from sylva_ray.attacks.losses import boosted_cross_entropy, cross_entropy, kl_divergence, true_class_probability
from sylva_ray.attacks.pgd import pgd
from sylva_ray.types import AttackSpec, ParameterStack

AdversarialLoss = Callable[[Cohort, ParameterStack, Batch, AttackSpec, float], torch.Tensor]
"""``(cohort, params, batch, attack, beta) -> [N]``; ``beta`` weighs the loss's robust term where it has one."""


def craft_ce(cohort: Cohort, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
    """PGD on the cross-entropy: ``[N, 3, H, W]``."""
    frozen = _frozen(params)

    def objective(x: torch.Tensor) -> torch.Tensor:
        return cross_entropy(cohort.model.forward(frozen, x, batch.owner), batch.y)

    with cohort.clock("attack"):
        return pgd(objective, batch.x, attack, batch.noise)


def craft_kl(cohort: Cohort, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
    """PGD on the divergence from the clean prediction, which is computed once."""
    frozen = _frozen(params)
    with cohort.clock("attack"):
        with torch.no_grad():
            clean = cohort.model.forward(frozen, batch.x, batch.owner)

        def objective(x: torch.Tensor) -> torch.Tensor:
            return kl_divergence(clean, cohort.model.forward(frozen, x, batch.owner))

        return pgd(objective, batch.x, attack, batch.noise)


def ce_adv(cohort: Cohort, params: ParameterStack, batch: Batch, attack: AttackSpec, beta: float) -> torch.Tensor:
    """CE(z(x'), y), x' by PGD on the same (Madry et al. 2018). ``beta`` is not used."""
    del beta
    x_adv = craft_ce(cohort, params, batch, attack)
    return cross_entropy(cohort.model.forward(params, x_adv, batch.owner), batch.y)


def trades(cohort: Cohort, params: ParameterStack, batch: Batch, attack: AttackSpec, beta: float) -> torch.Tensor:
    """CE(z(x), y) + beta KL(p(x) || p(x')), x' by PGD on the KL (Zhang et al. 2019); beta 6 is the paper's.

    The gradient flows through both arguments of the KL, as in the authors' code."""
    x_adv = craft_kl(cohort, params, batch, attack)
    clean = cohort.model.forward(params, batch.x, batch.owner)
    moved = cohort.model.forward(params, x_adv, batch.owner)
    return cross_entropy(clean, batch.y) + beta * kl_divergence(clean, moved)


def mart(cohort: Cohort, params: ParameterStack, batch: Batch, attack: AttackSpec, beta: float) -> torch.Tensor:
    """BCE(x', y) + beta KL(p(x) || p(x')) (1 - p_y(x)), x' by PGD on the CE (Wang et al. 2020); beta 5 is the paper's."""
    x_adv = craft_ce(cohort, params, batch, attack)
    clean = cohort.model.forward(params, batch.x, batch.owner)
    moved = cohort.model.forward(params, x_adv, batch.owner)
    doubt = 1 - true_class_probability(clean, batch.y)
    return boosted_cross_entropy(moved, batch.y) + beta * kl_divergence(clean, moved) * doubt


ADVERSARIAL_LOSSES: dict[str, AdversarialLoss] = {"ce_adv": ce_adv, "trades": trades, "mart": mart}


def class_weights(class_counts: torch.Tensor, beta: float) -> torch.Tensor:
    """Effective-number weights (Cui et al. 2019): ``[C, num_classes]`` from counts of the same shape.

    omega_c = (1 - beta) / (1 - beta^n_c), 0 for absent classes, rescaled so that the present ones sum to their number.
    beta = 0 weighs every class alike; beta -> 1 weighs by 1 / n_c.
    """
    counts = class_counts.double()
    present = counts > 0
    if beta == 0:
        return present.double()
    raw = torch.where(present, (1 - beta) / (1 - beta ** counts.clamp(min=1)), 0.0)
    return raw * present.sum(1, keepdim=True) / raw.sum(1, keepdim=True)


def _frozen(params: ParameterStack) -> ParameterStack:
    """The inner loop of an attack needs no weight gradient (`algorithms` crafts with the parameters detached)."""
    return {name: value.detach() for name, value in params.items()}

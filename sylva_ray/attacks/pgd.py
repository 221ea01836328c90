"""Projected gradient descent (Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks").

`pgd` is the attack that training defends against, in L-infinity and on any objective: only the gradient with respect to
the input is taken, for the inner loop needs no weight gradient. `PgdAttack` is the evaluation attack, in which every
iterate counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias

from pydantic import Field

from sylva_ray.attacks.base import LinfOrL2Attack, register
from sylva_ray.attacks.gradient import gradient_attack
from sylva_ray.attacks.norms import LINF
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.sections import PixelUnits
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

InputObjective: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
"""``x [N, 3, H, W] -> [N]``, summed (never averaged: half precision would lose small gradients) before the gradient."""


def default_step_size(epsilon: float, steps: int) -> float:
    """Return 2.5 epsilon / steps (Madry et al. 2018), never more than epsilon."""
    return min(epsilon, 2.5 * epsilon / steps)


def start(x: torch.Tensor, spec: AttackSpec, noise: torch.Tensor | None) -> torch.Tensor:
    """Return the attack's first point; ``noise`` is uniform in [-1, 1] with the shape of ``x``."""
    if not spec.random_start or spec.epsilon == 0:
        return x.detach()
    assert noise is not None, "a random start needs noise drawn by the caller"
    return LINF.project(x + spec.epsilon * noise, x, spec.epsilon).detach()


def pgd(
    objective: InputObjective, x: torch.Tensor, spec: AttackSpec, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Maximise ``objective`` within ``spec.epsilon`` of ``x``; the last iterate is returned, without a graph."""
    x_adv = start(x, spec, noise)
    for _ in range(spec.steps if spec.epsilon > 0 else 0):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(x_adv).sum(), x_adv)
        x_adv = LINF.project(x_adv.detach() + spec.step_size * gradient.sign(), x, spec.epsilon)
    return x_adv


@register
class PgdAttack(LinfOrL2Attack):
    """``step_size`` None: 2.5 epsilon / steps."""

    name: Literal["pgd"] = "pgd"
    steps: int = Field(20, ge=1)
    step_size: PixelUnits | None = Field(None, gt=0)
    random_start: bool = True
    restarts: int = Field(1, ge=1)
    loss: Literal["ce", "margin"] = "ce"
    shown: ClassVar[str] = "PGD"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`; the options hold a step size and a fixed start that are not the default."""
        options: tuple[tuple[str, float], ...] = ()
        step_size = default_step_size(self.epsilon, self.steps)
        if self.step_size is not None and self.step_size != step_size:
            step_size = self.step_size
            options = (("step", step_size * 255 if self.norm == "linf" else step_size),)
        if not self.random_start:
            options += (("fixed", 1.0),)
        return AttackSpec(
            name="pgd",
            epsilon=self.epsilon,
            steps=self.steps,
            step_size=step_size,
            random_start=self.random_start,
            restarts=self.restarts,
            loss=self.loss,
            norm=self.norm,
            options=options,
        )

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """See `gradient_attack`."""
        gradient_attack(state, spec, draws)

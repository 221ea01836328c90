"""PGD (projected gradient descent): steps along the gradient that stay within the budget.

Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks". `pgd` is the attack of
adversarial training, in L-infinity, for any loss; it returns the last iterate. `PgdAttack` is the evaluation attack,
which succeeds if any of its iterates is adversarial.
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
from sylva_ray.core.sections import Count, PixelUnits
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

ImageLoss: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
"""A per-image loss as a function of the images, ``x [N, 3, H, W] -> [N]``."""


def default_step_size(epsilon: float, steps: int) -> float:
    """Return 2.5 epsilon / steps (Madry et al. 2018), at most epsilon."""
    return min(epsilon, 2.5 * epsilon / steps)


def initial_point(x: torch.Tensor, spec: AttackSpec, noise: torch.Tensor | None) -> torch.Tensor:
    """Return the first iterate; ``noise`` is uniform in [-1, 1] and has the shape of ``x``."""
    if not spec.random_start or spec.epsilon == 0:
        return x.detach()
    assert noise is not None, "a random start needs noise drawn by the caller"
    return LINF.project(x + spec.epsilon * noise, x, spec.epsilon).detach()


def pgd(loss: ImageLoss, x: torch.Tensor, spec: AttackSpec, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Maximise ``loss`` in the L-infinity ball of radius ``spec.epsilon`` around ``x``.

    Only the gradient with respect to the images is computed, none with respect to weights.

    Args:
        loss: per-image loss. Its sum is differentiated, not its mean, which would underflow in half precision.
        x: images ``[N, 3, H, W]`` in [0, 1].
        spec: epsilon, number of steps, step size and whether the start is random.
        noise: uniform in [-1, 1] with the shape of ``x``; needed for a random start.

    Returns:
        The last iterate ``[N, 3, H, W]``, detached.
    """
    x_adv = initial_point(x, spec, noise)
    for _ in range(spec.steps if spec.epsilon > 0 else 0):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x_adv).sum(), x_adv)
        x_adv = LINF.project(x_adv.detach() + spec.step_size * gradient.sign(), x, spec.epsilon)
    return x_adv


@register
class PgdAttack(LinfOrL2Attack):
    """Settings of PGD.

    Attributes:
        step_size: None: `default_step_size`.
        random_start: whether the first run begins at a random point of the ball, not at the image.
        restarts: number of runs; all but the first begin at a new random point.
    """

    name: Literal["pgd"] = "pgd"
    steps: Count = 20
    step_size: PixelUnits | None = Field(None, gt=0)
    random_start: bool = True
    restarts: Count = 1
    loss: Literal["ce", "margin"] = "ce"
    display_name: ClassVar[str] = "PGD"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`. A step size or a start that is not the default becomes an option."""
        options: tuple[tuple[str, float], ...] = ()
        step_size = default_step_size(self.epsilon, self.steps)
        if self.step_size is not None and self.step_size != step_size:
            step_size = self.step_size
            options = (("step", step_size * 255 if self.norm == "linf" else step_size),)
        if not self.random_start:
            options += (("fixed", 1.0),)
        return AttackSpec(
            name=self.name,
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

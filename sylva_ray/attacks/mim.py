"""MIM (momentum iterative method): PGD along a decaying sum of gradients.

Source: Dong et al. 2018, "Boosting Adversarial Attacks with Momentum".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.base import LinfOrL2Attack, register
from sylva_ray.attacks.gradient import gradient_attack
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec


@register
class MimAttack(LinfOrL2Attack):
    """Settings of MIM.

    Attributes:
        decay: factor of the sum of gradients per step (mu in the paper).
    """

    name: Literal["mim"] = "mim"
    steps: Count = 10
    decay: float = Field(1.0, ge=0)
    display_name: ClassVar[str] = "MIM"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`. As in the paper, the step size is epsilon / steps and there is no random start."""
        step_size, decay = self.epsilon / self.steps, ("decay", self.decay)
        return AttackSpec(self.name, self.epsilon, self.steps, step_size, False, norm=self.norm, options=(decay,))

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """See `gradient_attack`."""
        gradient_attack(state, spec, draws, decay=cls.option(spec, "decay"))

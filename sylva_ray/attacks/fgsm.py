"""FGSM: one step of size epsilon along the sign of the gradient.

Source: Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from sylva_ray.attacks.base import LinfAttack, register
from sylva_ray.attacks.gradient import gradient_attack
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec


@register
class FgsmAttack(LinfAttack):
    """Settings of FGSM."""

    name: Literal["fgsm"] = "fgsm"
    loss: Literal["ce", "margin"] = "ce"
    display_name: ClassVar[str] = "FGSM"
    counts_steps: ClassVar[bool] = False

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        return AttackSpec(self.name, self.epsilon, 1, self.epsilon, random_start=False, loss=self.loss)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """See `gradient_attack`."""
        gradient_attack(state, spec, draws)

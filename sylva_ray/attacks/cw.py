"""CW-Linf: PGD on the margin loss of Carlini and Wagner.

Source: Carlini and Wagner 2017, "Towards Evaluating the Robustness of Neural Networks".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from sylva_ray.attacks.base import LinfAttack, register
from sylva_ray.attacks.gradient import gradient_attack
from sylva_ray.attacks.pgd import default_step_size
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec


@register
class CwAttack(LinfAttack):
    """Settings of PGD on the margin loss (kappa = 0) in the L-infinity ball."""

    name: Literal["cw"] = "cw"
    steps: Count = 50
    restarts: Count = 1
    display_name: ClassVar[str] = "CW"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        step_size = default_step_size(self.epsilon, self.steps)
        return AttackSpec(self.name, self.epsilon, self.steps, step_size, True, self.restarts, "margin")

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """See `gradient_attack`."""
        gradient_attack(state, spec, draws)

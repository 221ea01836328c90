"""AutoAttack (Croce and Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks"): the standard ensemble, each part on the survivors of the ones before it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.apgd import ApgdAttack
from sylva_ray.attacks.base import Attack, LinfAttack, register
from sylva_ray.attacks.fab import FabAttack
from sylva_ray.attacks.square import SquareAttack
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

QUERIES_PER_STEP = 50
"""Square has as many queries for every step of the gradient attacks: 5,000 for 100."""


@register
class AutoAttack(LinfAttack):
    """The standard ensemble; ``steps`` of its gradient attacks (Square has fifty times as many queries)."""

    name: Literal["autoattack"] = "autoattack"
    steps: int = Field(100, ge=1)
    shown: ClassVar[str] = "AutoAttack"
    counts_steps: ClassVar[bool] = False

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        return AttackSpec("autoattack", self.epsilon, self.steps, 0.0, options=self.changed("steps"))

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Run APGD on the cross-entropy, targeted APGD, FAB and Square.

        Fewer than four classes have no targeted DLR: the untargeted one takes its place, and two classes have neither.
        """
        epsilon, steps, num_classes = spec.epsilon, spec.steps, state.clean.shape[1]
        parts: list[Attack] = [ApgdAttack(epsilon=epsilon, steps=steps)]
        if num_classes >= 3:
            loss: Literal["dlr", "targeted"] = "targeted" if num_classes >= 4 else "dlr"
            parts.append(ApgdAttack(epsilon=epsilon, steps=steps, loss=loss))
        parts.append(FabAttack(epsilon=epsilon, steps=steps))
        parts.append(SquareAttack(epsilon=epsilon, queries=QUERIES_PER_STEP * steps))
        for part in parts:
            part.run(state, part.spec(), draws)

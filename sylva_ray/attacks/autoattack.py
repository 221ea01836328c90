"""AutoAttack: the standard ensemble of APGD, FAB and Square.

Source: Croce and Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
Attacks". Each attack runs only on the images that are still robust after the attacks before it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from sylva_ray.attacks.apgd import ApgdAttack
from sylva_ray.attacks.base import Attack, LinfAttack, register
from sylva_ray.attacks.fab import FabAttack
from sylva_ray.attacks.square import SquareAttack
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

QUERIES_PER_STEP = 50
"""Queries of Square per step of the gradient attacks: 5,000 for 100 steps."""


@register
class AutoAttack(LinfAttack):
    """Settings of AutoAttack.

    Attributes:
        steps: of each gradient attack; Square makes `QUERIES_PER_STEP` times as many queries.
    """

    name: Literal["autoattack"] = "autoattack"
    steps: Count = 100
    display_name: ClassVar[str] = "AutoAttack"
    counts_steps: ClassVar[bool] = False

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        return AttackSpec(self.name, self.epsilon, self.steps, 0.0, options=self.changed("steps"))

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Run APGD on the cross-entropy, APGD on the targeted DLR, FAB and Square.

        The targeted DLR needs four classes. With three classes the untargeted DLR replaces it; with two classes that
        attack is left out.
        """
        epsilon, steps, num_classes = spec.epsilon, spec.steps, state.clean_logits.shape[1]
        attacks: list[Attack] = [ApgdAttack(epsilon=epsilon, steps=steps)]
        if num_classes >= 3:
            loss: Literal["dlr", "targeted"] = "targeted" if num_classes >= 4 else "dlr"
            attacks.append(ApgdAttack(epsilon=epsilon, steps=steps, loss=loss))
        attacks.append(FabAttack(epsilon=epsilon, steps=steps))
        attacks.append(SquareAttack(epsilon=epsilon, queries=QUERIES_PER_STEP * steps))
        for attack in attacks:
            attack.run(state, attack.spec(), draws)

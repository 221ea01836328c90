"""An attack of one's own: momentum of the gradient's sign, then a step back towards the image.

sylva-ray run digits --import . 'evaluation.attacks=[{name: examples.own_attack:SignMomentum, steps: 10}]'
sylva-ray evaluate RUN --import . --attack examples.own_attack:SignMomentum:steps=10
"""

from __future__ import annotations

from typing import ClassVar

import torch

from sylva_ray.attacks.base import LinfAttack
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec


class SignMomentum(LinfAttack):
    """Settings of the attack; those that every attack in the L-infinity ball has come from the base class.

    Attributes:
        steps: gradient steps.
        decay: of the momentum.
    """

    steps: Count = 10
    decay: float = 0.5
    display_name: ClassVar[str] = "sign momentum"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        step_size = 2.5 * self.epsilon / self.steps
        return AttackSpec(self.name, self.epsilon, self.steps, step_size, options=self.changed("decay"))

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """See `Attack.run`. The state records every point that is adversarial, so nothing is returned."""
        start = spec.epsilon * draws.signed(0, state.x.shape[1:])
        x_adv, momentum = (state.x + start).clamp(0, 1), torch.zeros_like(state.x)
        for _ in range(spec.steps):
            rows = state.remaining()
            if not len(rows):
                return
            _, gradient, _ = state.gradient(x_adv[rows], rows, lambda logits, at: cross_entropy(logits, state.y[at]))
            momentum[rows] = cls.option(spec, "decay") * momentum[rows] + gradient.sign()
            moved = x_adv[rows] + spec.step_size * momentum[rows].sign()
            x = state.x[rows]
            x_adv[rows] = moved.clamp(x - spec.epsilon, x + spec.epsilon).clamp(0, 1)
        rows = state.remaining()
        state.logits(x_adv[rows], rows)

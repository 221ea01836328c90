"""Random noise: the baseline that every attack has to exceed."""

from __future__ import annotations

from typing import ClassVar, Literal

from sylva_ray.attacks.base import LinfOrL2Attack, register
from sylva_ray.attacks.norms import NORMS
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec


@register
class NoiseAttack(LinfOrL2Attack):
    """Settings of random noise.

    Attributes:
        tries: number of points, drawn uniformly from the ball.
    """

    name: Literal["noise"] = "noise"
    tries: Count = 10
    display_name: ClassVar[str] = "random noise"
    black_box: ClassVar[bool] = True

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        return AttackSpec(self.name, self.epsilon, self.tries, 0.0, norm=self.norm)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Try ``spec.steps`` points.

        Forwards use the precision of the model: no later step would find a success that rounding in bfloat16 hides.
        """
        norm = NORMS[spec.norm]
        with state.at_model_precision():
            for stream_index in range(spec.steps):
                rows = state.remaining()
                if not len(rows):
                    return
                x = state.x[rows]
                step = spec.epsilon * norm.inside(x, draws.select(rows), stream_index)
                state.logits(norm.project(x + step, x, spec.epsilon), rows)

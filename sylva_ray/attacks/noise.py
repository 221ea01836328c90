"""Random noise: what an attack has to be better than."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.base import LinfOrL2Attack, register
from sylva_ray.attacks.norms import NORMS
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec


@register
class NoiseAttack(LinfOrL2Attack):
    """``tries`` uniform points of the ball."""

    name: Literal["noise"] = "noise"
    tries: int = Field(10, ge=1)
    shown: ClassVar[str] = "random noise"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        return AttackSpec("noise", self.epsilon, self.tries, 0.0, norm=self.norm)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Try ``spec.steps`` points.

        No gradient makes up for a success that bfloat16 overlooks, so answers are those of the model's own precision.
        """
        norm = NORMS[spec.norm]
        with state.exact():
            for stream_index in range(spec.steps):
                rows = state.remaining()
                if not len(rows):
                    return
                x = state.x[rows]
                step = spec.epsilon * norm.inside(x, draws.of(rows), stream_index)
                state.logits(norm.project(x + step, x, spec.epsilon), rows)

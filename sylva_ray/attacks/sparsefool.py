"""SparseFool (Modas et al. 2019, "SparseFool: A Few Pixels Make a Big Difference"): an adversarial image that differs
in few pixels. With a budget it also reports which images are robust within it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.base import INFINITE, Attack, register
from sylva_ray.attacks.deepfool import OVERSHOOT, STEPS, step_to_boundary
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

LEAST_MOVE = 1e-4
"""Of a pixel, so that rounding cannot stop the sparse solver at the plane."""


@register
class SparseFoolAttack(Attack):
    """Few pixels; ``reach`` times DeepFool's step to the boundary; with ``epsilon``, what is robust within as many."""

    name: Literal["sparsefool"] = "sparsefool"
    steps: int = Field(20, ge=1)
    reach: float = Field(3.0, ge=1)
    overshoot: float = Field(OVERSHOOT, ge=0)
    epsilon: float | None = Field(None, ge=0, description="pixels")
    shown: ClassVar[str] = "SparseFool"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        epsilon = INFINITE if self.epsilon is None else self.epsilon
        options = self.changed("reach", "overshoot")
        return AttackSpec("sparsefool", epsilon, self.steps, 0.0, random_start=False, norm="l0", options=options)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Go ``reach`` times as far as DeepFool's boundary, at most ``spec.steps`` times.

        The way leads along the coordinates that count most. As with the authors, each time starts where the last one
        ended, and what is tried is that point's way from the image, times 1 + overshoot. Answers are those of the
        model's own precision.
        """
        del draws
        overshoot, reach = cls.option(spec, "overshoot"), cls.option(spec, "reach")
        rows = state.remaining()
        at = state.x[rows]
        with state.exact():
            for _ in range(spec.steps):
                if not len(rows):
                    return
                far, normal = _boundary(state, at, rows)
                at = sparse_step(at, normal, (normal * (reach * far)).flatten(1).sum(1))
                x = state.x[rows]
                answers = state.logits((x + (1 + overshoot) * (at - x)).clamp(0, 1), rows).argmax(1)
                keep = answers == state.y[rows]
                rows, at = rows[keep], at[keep]


def sparse_step(z: torch.Tensor, normal: torch.Tensor, rise: torch.Tensor) -> torch.Tensor:
    """Move as few coordinates as possible so that ``normal . (z' - z) >= rise`` inside [0, 1]: the largest ``|normal|``
    first, each to its bound, the last one as far as needed."""
    flat, weight = z.flatten(1), normal.flatten(1)
    room = torch.where(weight > 0, 1 - flat, flat) * (weight != 0)
    size, order = weight.abs().sort(dim=1, descending=True)
    room_sorted = room.gather(1, order)
    gain = size * room_sorted
    missing = (rise[:, None] - (gain.cumsum(1) - gain)).clamp(min=0)
    move = torch.minimum(missing / size.clamp(min=1e-12) + (missing > 0) * LEAST_MOVE, room_sorted)
    delta = torch.zeros_like(flat).scatter(1, order, move) * weight.sign()
    return (flat + delta).view_as(z).clamp(0, 1)


def _boundary(state: AttackState, start: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run DeepFool from ``start`` on a path of its own; return how far the boundary is, and its normal there."""
    at, far, normal = start, torch.zeros_like(start), torch.zeros_like(start)
    is_right = torch.ones(len(rows), dtype=torch.bool, device=start.device)
    for _ in range(STEPS):
        chosen = is_right.nonzero()[:, 0]
        if not len(chosen):
            break
        move, towards = step_to_boundary(state, at[chosen], rows[chosen])
        far, normal, at = far.clone(), normal.clone(), at.clone()
        far[chosen] += move
        normal[chosen] = towards
        at[chosen] = start[chosen] + (1 + OVERSHOOT) * far[chosen]
        answers = state.logits(at[chosen], rows[chosen], record=False).argmax(1)
        is_right[chosen] = answers == state.y[rows[chosen]]
    return far, normal

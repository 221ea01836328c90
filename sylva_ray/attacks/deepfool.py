"""DeepFool (Moosavi-Dezfooli et al. 2016, "DeepFool: A Simple and Accurate Method to Fool Deep Neural Networks"): the
nearest adversarial image in L2. With a budget it also reports which images are robust within it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.base import INFINITE, Attack, register
from sylva_ray.attacks.losses import lead
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

CANDIDATES = 10
"""Classes whose boundaries are looked at: the likeliest ones."""
STEPS, OVERSHOOT = 50, 0.02
"""At most so many steps, and how much further than to the boundary is tried: the authors' constants."""


@register
class DeepFoolAttack(Attack):
    """The nearest adversarial image in L2; with ``epsilon``, also what is robust within it."""

    name: Literal["deepfool"] = "deepfool"
    steps: int = Field(STEPS, ge=1)
    overshoot: float = Field(OVERSHOOT, ge=0)
    epsilon: float | None = Field(None, ge=0, description="length of the perturbation")
    shown: ClassVar[str] = "DeepFool"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        epsilon = INFINITE if self.epsilon is None else self.epsilon
        options = self.changed("overshoot")
        return AttackSpec("deepfool", epsilon, self.steps, 0.0, random_start=False, norm="l2", options=options)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Take at most ``spec.steps`` steps to the nearest linearised boundary.

        Their sum, times 1 + overshoot, is tried. Answers are those of the model's own precision.
        """
        del draws
        reach = 1 + cls.option(spec, "overshoot")
        rows = state.remaining()
        total = torch.zeros_like(state.x[rows])
        with state.exact():
            for _ in range(spec.steps):
                if not len(rows):
                    return
                x_adv = (state.x[rows] + reach * total).clamp(0, 1)
                move, _ = step_to_boundary(state, x_adv, rows)
                total = total + move
                x_adv = (state.x[rows] + reach * total).clamp(0, 1)
                answers = state.logits(x_adv, rows).argmax(1)
                keep = answers == state.y[rows]
                rows, total = rows[keep], total[keep]


def step_to_boundary(state: AttackState, x_adv: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the step to the nearest linearised boundary ``[n, 3, H, W]`` and its normal, towards the wrong side."""
    logits = state.logits(x_adv, rows, record=False)
    y = state.y[rows]
    wrong = logits.scatter(1, y[:, None], float("-inf")).topk(min(CANDIDATES, logits.shape[1]) - 1, dim=1).indices
    nearest = torch.full((len(rows),), float("inf"), device=x_adv.device)
    step, normal = torch.zeros_like(x_adv), torch.zeros_like(x_adv)
    for k in range(wrong.shape[1]):

        def ahead(z: torch.Tensor, _: torch.Tensor, target: torch.Tensor = wrong[:, k]) -> torch.Tensor:
            return lead(z, y, target)

        value, gradient, _ = state.gradient(x_adv, rows, ahead, record=False)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        distance = value.abs() / length
        closer = (distance < nearest).view(-1, 1, 1, 1)
        scale = ((value.abs() + 1e-4) / length**2).view(-1, 1, 1, 1)
        step, normal = torch.where(closer, scale * gradient, step), torch.where(closer, gradient, normal)
        nearest = torch.minimum(distance, nearest)
    return step, normal

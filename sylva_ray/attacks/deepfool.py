"""DeepFool: an approximation of the nearest adversarial image in L2.

Source: Moosavi-Dezfooli et al. 2016, "DeepFool: A Simple and Accurate Method to Fool Deep Neural Networks". With a
budget, the result also tells which images are robust within that distance.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.base import INFINITE, Attack, register
from sylva_ray.attacks.losses import target_margin
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

CANDIDATES = 10
"""Number of classes whose decision boundaries are considered: those with the largest logits, true class included."""
STEPS, OVERSHOOT = 50, 0.02
"""Default number of steps and default overshoot, as in the authors' code."""


@register
class DeepFoolAttack(Attack):
    """Settings of DeepFool.

    Attributes:
        steps: at most this many steps.
        overshoot: fraction by which the perturbation exceeds the distance to the boundary.
        epsilon: None: unlimited.
    """

    name: Literal["deepfool"] = "deepfool"
    steps: Count = STEPS
    overshoot: float = Field(OVERSHOOT, ge=0)
    epsilon: float | None = Field(None, ge=0, description="L2 norm of the perturbation")
    display_name: ClassVar[str] = "DeepFool"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        epsilon = INFINITE if self.epsilon is None else self.epsilon
        options = self.changed("overshoot")
        return AttackSpec(self.name, epsilon, self.steps, 0.0, random_start=False, norm="l2", options=options)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Take at most ``spec.steps`` steps to the nearest linearised boundary.

        After every step, the sum of the steps times 1 + overshoot is tried. Forwards use the precision of the model.
        """
        del draws
        scale = 1 + cls.option(spec, "overshoot")
        rows = state.remaining()
        total = torch.zeros_like(state.x[rows])
        with state.at_model_precision():
            for _ in range(spec.steps):
                if not len(rows):
                    return
                x_adv = (state.x[rows] + scale * total).clamp(0, 1)
                total = total + step_to_boundary(state, x_adv, rows)
                x_adv = (state.x[rows] + scale * total).clamp(0, 1)
                predictions = state.logits(x_adv, rows).argmax(1)
                keep = predictions == state.y[rows]
                rows, total = rows[keep], total[keep]


def step_to_boundary(state: AttackState, x_adv: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Compute the step from ``x_adv`` to the nearest linearised decision boundary.

    Args:
        state: the images and the model.
        x_adv: current points ``[n, 3, H, W]``.
        rows: which images they belong to, ``[n]``.

    Returns:
        The step ``[n, 3, H, W]``.
    """
    logits = state.logits(x_adv, rows, record=False)
    y = state.y[rows]
    wrong = logits.scatter(1, y[:, None], float("-inf")).topk(min(CANDIDATES, logits.shape[1]) - 1, dim=1).indices
    nearest = torch.full((len(rows),), float("inf"), device=x_adv.device)
    step = torch.zeros_like(x_adv)
    for k in range(wrong.shape[1]):

        def margin_to_target(z: torch.Tensor, _: torch.Tensor, target: torch.Tensor = wrong[:, k]) -> torch.Tensor:
            return target_margin(z, y, target)

        value, gradient, _ = state.gradient(x_adv, rows, margin_to_target, record=False)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        distance = value.abs() / length
        closer = (distance < nearest).view(-1, 1, 1, 1)
        scale = ((value.abs() + 1e-4) / length**2).view(-1, 1, 1, 1)
        step = torch.where(closer, scale * gradient, step)
        nearest = torch.minimum(distance, nearest)
    return step

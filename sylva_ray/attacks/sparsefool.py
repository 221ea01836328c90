"""SparseFool: an adversarial image that differs in few pixels.

Source: Modas et al. 2019, "SparseFool: A Few Pixels Make a Big Difference". With a budget, the result also tells which
images are robust against changes of that many pixels.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.base import INFINITE, Attack, register
from sylva_ray.attacks.deepfool import OVERSHOOT, STEPS, step_to_boundary
from sylva_ray.attacks.losses import target_margin
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

MIN_MOVE = 1e-4
"""Added to every move in pixel units, so that the solver does not stop at the plane because of rounding."""


@register
class SparseFoolAttack(Attack):
    """Settings of SparseFool.

    Attributes:
        steps: at most this many calls of the sparse solver.
        reach: by which factor a step exceeds DeepFool's step to the boundary (lambda in the paper).
        overshoot: fraction by which the final perturbation is enlarged.
        epsilon: number of pixels; None: unlimited.
    """

    name: Literal["sparsefool"] = "sparsefool"
    steps: Count = 20
    reach: float = Field(3.0, ge=1)
    overshoot: float = Field(OVERSHOOT, ge=0)
    epsilon: float | None = Field(None, ge=0, description="number of pixels")
    display_name: ClassVar[str] = "SparseFool"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        epsilon = INFINITE if self.epsilon is None else self.epsilon
        options = self.changed("reach", "overshoot")
        return AttackSpec(self.name, epsilon, self.steps, 0.0, random_start=False, norm="l0", options=options)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Take at most ``spec.steps`` sparse steps to DeepFool's linearised boundary.

        As in the authors' code, each step starts where the last one ended, and the perturbation times 1 + overshoot is
        tried after every step. Forwards use the precision of the model.
        """
        del draws
        overshoot, reach = cls.option(spec, "overshoot"), cls.option(spec, "reach")
        rows = state.remaining()
        point = state.x[rows]
        with state.at_model_precision():
            for _ in range(spec.steps):
                if not len(rows):
                    return
                displacement, normal = _boundary(state, point, rows)
                point = sparse_step(point, normal, (normal * (reach * displacement)).flatten(1).sum(1))
                x = state.x[rows]
                predictions = state.logits((x + (1 + overshoot) * (point - x)).clamp(0, 1), rows).argmax(1)
                keep = predictions == state.y[rows]
                rows, point = rows[keep], point[keep]


def sparse_step(z: torch.Tensor, normal: torch.Tensor, required: torch.Tensor) -> torch.Tensor:
    """Change as few coordinates as possible so that ``normal . (z' - z) >= required`` with z' in [0, 1].

    Coordinates move in the order of decreasing ``|normal|``, each to its bound and the last one as far as needed.

    Args:
        z: points ``[n, ...]`` in [0, 1].
        normal: of the shape of ``z``.
        required: ``[n]``.

    Returns:
        z', of the shape of ``z``.
    """
    flat, weight = z.flatten(1), normal.flatten(1)
    slack = torch.where(weight > 0, 1 - flat, flat) * (weight != 0)
    magnitude, order = weight.abs().sort(dim=1, descending=True)
    sorted_slack = slack.gather(1, order)
    gain = magnitude * sorted_slack
    missing = (required[:, None] - (gain.cumsum(1) - gain)).clamp(min=0)
    move = torch.minimum(missing / magnitude.clamp(min=1e-12) + (missing > 0) * MIN_MOVE, sorted_slack)
    delta = torch.zeros_like(flat).scatter(1, order, move) * weight.sign()
    return (flat + delta).view_as(z).clamp(0, 1)


def _boundary(state: AttackState, start: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run DeepFool from ``start``; return the displacement to the boundary and the normal of the boundary there.

    The normal is the gradient at the point that DeepFool has reached, of the class there against the true one (x_B in
    algorithm 2 of the paper).
    """
    point, displacement, y = start, torch.zeros_like(start), state.y[rows]
    is_right = torch.ones(len(rows), dtype=torch.bool, device=start.device)
    for _ in range(STEPS):
        active = is_right.nonzero()[:, 0]
        if not len(active):
            break
        displacement, point = displacement.clone(), point.clone()
        displacement[active] += step_to_boundary(state, point[active], rows[active])
        point[active] = start[active] + (1 + OVERSHOOT) * displacement[active]
        predictions = state.logits(point[active], rows[active], record=False).argmax(1)
        is_right[active] = predictions == y[active]
    logits = state.logits(point, rows, record=False)
    reached = logits.scatter(1, y[:, None], float("-inf")).argmax(1)
    _, normal, _ = state.gradient(point, rows, lambda z, _: target_margin(z, y, reached), record=False)
    return displacement, normal

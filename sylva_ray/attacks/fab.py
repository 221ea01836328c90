"""FAB (Fast Adaptive Boundary), targeted, for the L-infinity norm.

Source: Croce and Hein 2020, "Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack". Every step
goes to the linearised decision boundary, biased towards the original image. Once a point is misclassified, the search
continues from a point closer to the original image; once it is within the budget, the search for that image ends.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from sylva_ray.attacks.apgd import ranked_targets
from sylva_ray.attacks.base import LinfAttack, register
from sylva_ray.attacks.losses import target_margin
from sylva_ray.attacks.norms import LINF
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

ETA, ALPHA, BETA = 1.05, 0.1, 0.9
"""Overshoot, maximal bias towards the original image, contraction after a success: the constants of AutoAttack."""


@register
class FabAttack(LinfAttack):
    """Settings of FAB.

    Attributes:
        steps: per target class.
        targets: number of target classes, the most likely wrong classes first.
    """

    name: Literal["fab"] = "fab"
    steps: Count = 100
    restarts: Count = 1
    targets: Count = 9
    display_name: ClassVar[str] = "FAB"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        options = (("targets", float(self.targets)),)
        return AttackSpec(self.name, self.epsilon, self.steps, 0.0, False, self.restarts, options=options)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Take ``spec.steps`` steps towards each target class. All restarts but the first begin at a random point.

        The iterates are close to the decision boundary, so forwards use the precision of the model.
        """
        ranked = ranked_targets(state.clean_logits, state.y, int(cls.option(spec, "targets")))
        with state.at_model_precision():
            for restart in range(spec.restarts):
                for number, targets in enumerate(ranked):
                    stream_index = restart * len(ranked) + number
                    _run_once(state, spec, draws, stream_index, targets, random_start=restart > 0)


def _run_once(
    state: AttackState,
    spec: AttackSpec,
    draws: ImageDraws,
    stream_index: int,
    targets: torch.Tensor,
    random_start: bool,
) -> None:
    rows = state.remaining()
    if not len(rows):
        return
    x_adv = state.x[rows]
    if random_start:
        x_adv = (x_adv + spec.epsilon * LINF.inside(x_adv, draws.select(rows), stream_index)).clamp(0, 1)
    for _ in range(spec.steps):
        margins, gradient, _ = state.gradient(
            x_adv, rows, lambda logits, rows: target_margin(logits, state.y[rows], targets[rows])
        )
        keep = state.is_robust[rows]
        if not keep.any():
            return
        rows, x_adv, margins, gradient = rows[keep], x_adv[keep], margins[keep], gradient[keep]
        x = state.x[rows]
        required = -margins  # increase of the linearised margin up to the boundary
        from_current = nearest_on_plane(x_adv, gradient, required)
        offset = (gradient * (x - x_adv)).flatten(1).sum(1)
        from_original = nearest_on_plane(x, gradient, required - offset)
        current, original = (LINF.length(d).clamp(min=1e-8) for d in (from_current, from_original))
        bias = (current / (current + original)).clamp(max=ALPHA).view(-1, 1, 1, 1)
        x_adv = ((x_adv + ETA * from_current) * (1 - bias) + (x + ETA * from_original) * bias).clamp(0, 1)
        is_wrong = (state.logits(x_adv, rows).argmax(1) != state.y[rows]).view(-1, 1, 1, 1)
        x_adv = torch.where(is_wrong, x + BETA * (x_adv - x), x_adv)
        keep = state.is_robust[rows]
        rows, x_adv = rows[keep], x_adv[keep]
        if not len(rows):
            return


def nearest_on_plane(z: torch.Tensor, w: torch.Tensor, required: torch.Tensor) -> torch.Tensor:
    """Find the smallest d in L-infinity with ``w . d = required`` and ``z + d`` in [0, 1].

    Every coordinate moves by min(t, its slack) in the direction of the required sign, where the slack is the distance
    to the bound of the pixel range. So ``w . d`` is piecewise linear in t, and its knots are the sorted slacks.

    Args:
        z: points ``[n, ...]`` in [0, 1].
        w: normals of the planes, of the shape of ``z``.
        required: ``[n]``, the required change of ``w . z``.

    Returns:
        d, of the shape of ``z``. If the plane does not meet the pixel range, every coordinate moves to its bound.
    """
    n = len(z)
    flat_w, flat_z, needed = w.flatten(1), z.flatten(1), required.abs()
    direction = (flat_w.sign() * required.sign()[:, None]).to(flat_z.dtype)
    slack = torch.where(direction > 0, 1 - flat_z, flat_z) * direction.abs()
    knots, order = slack.sort(dim=1)
    weight = flat_w.abs().gather(1, order)
    saturated = (weight * knots).cumsum(1)  # change by the coordinates that are at their bounds, this one included
    free_weight = weight.sum(1, keepdim=True) - weight.cumsum(1)
    change = saturated + free_weight * knots
    first_enough = (change < needed[:, None]).sum(1)  # index of the first knot at which the change is large enough
    knot = first_enough.clamp(max=knots.shape[1] - 1)[:, None]
    before = (saturated - weight * knots).gather(1, knot)[:, 0]
    slope = (free_weight + weight).gather(1, knot)[:, 0]
    t = ((needed - before) / slope.clamp(min=1e-12)).clamp(min=0)
    t = torch.where(first_enough == knots.shape[1], torch.full_like(t, 1.0), t)
    return (direction * torch.minimum(slack, t[:, None])).view(n, *z.shape[1:])

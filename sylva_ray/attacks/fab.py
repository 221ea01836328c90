"""FAB, targeted (Croce and Hein 2020, "Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack"),
for the L-infinity norm: steps onto the linearised boundary, pulled towards the original image, and back along the line
once across.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.apgd import ranked_targets
from sylva_ray.attacks.base import LinfAttack, register
from sylva_ray.attacks.losses import lead
from sylva_ray.attacks.norms import LINF
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

ETA, ALPHA, BETA = 1.05, 0.1, 0.9
"""Overshoot, largest pull towards the original, share of the way that is kept after a success: as in AutoAttack."""


@register
class FabAttack(LinfAttack):
    """Towards the boundary with each of the ``targets`` likeliest wrong classes."""

    name: Literal["fab"] = "fab"
    steps: int = Field(100, ge=1)
    restarts: int = Field(1, ge=1)
    targets: int = Field(9, ge=1)
    shown: ClassVar[str] = "FAB"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        options = (("targets", float(self.targets)),)
        return AttackSpec("fab", self.epsilon, self.steps, 0.0, False, self.restarts, options=options)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Take ``spec.steps`` steps towards each target; all ``restarts`` but the first start at random.

        It walks along the decision boundary, so it computes in the model's own precision.
        """
        ranked = ranked_targets(state.clean, state.y, int(cls.option(spec, "targets")))
        with state.exact():
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
        x_adv = (x_adv + spec.epsilon * LINF.inside(x_adv, draws.of(rows), stream_index)).clamp(0, 1)
    for _ in range(spec.steps):
        ahead, gradient, _ = state.gradient(x_adv, rows, lambda logits, at: lead(logits, state.y[at], targets[at]))
        keep = state.is_robust[rows]
        if not keep.any():
            return
        rows, x_adv, ahead, gradient = rows[keep], x_adv[keep], ahead[keep], gradient[keep]
        x = state.x[rows]
        rise = -ahead  # what the linearised lead of the target still has to gain
        from_here = nearest_on_plane(x_adv, gradient, rise)
        offset = (gradient * (x - x_adv)).flatten(1).sum(1)
        from_origin = nearest_on_plane(x, gradient, rise - offset)
        here, origin = (LINF.length(d).clamp(min=1e-8) for d in (from_here, from_origin))
        pull = (here / (here + origin)).clamp(max=ALPHA).view(-1, 1, 1, 1)
        x_adv = ((x_adv + ETA * from_here) * (1 - pull) + (x + ETA * from_origin) * pull).clamp(0, 1)
        across = (state.logits(x_adv, rows).argmax(1) != state.y[rows]).view(-1, 1, 1, 1)
        x_adv = torch.where(across, x + BETA * (x_adv - x), x_adv)
        keep = state.is_robust[rows]
        rows, x_adv = rows[keep], x_adv[keep]
        if not len(rows):
            return


def nearest_on_plane(z: torch.Tensor, w: torch.Tensor, rise: torch.Tensor) -> torch.Tensor:
    """The shortest d in L-infinity with ``w . d = rise`` and ``z + d`` in [0, 1]; all the way to the corner where none
    is enough.

    Every coordinate moves by min(t, its room) in the direction that helps, so w . d is piecewise linear in t and its
    knots are the sorted rooms."""
    n = len(z)
    flat_w, flat_z, need = w.flatten(1), z.flatten(1), rise.abs()
    direction = (flat_w.sign() * rise.sign()[:, None]).to(flat_z.dtype)
    room = torch.where(direction > 0, 1 - flat_z, flat_z) * direction.abs()
    knots, order = room.sort(dim=1)
    weight = flat_w.abs().gather(1, order)
    passed = (weight * knots).cumsum(1)  # gained by coordinates whose room is used up, this one included
    open_weight = weight.sum(1, keepdim=True) - weight.cumsum(1)
    gained = passed + open_weight * knots
    first = (gained < need[:, None]).sum(1)  # the first knot at which enough is gained
    at = first.clamp(max=knots.shape[1] - 1)[:, None]
    before = (passed - weight * knots).gather(1, at)[:, 0]
    slope = (open_weight + weight).gather(1, at)[:, 0]
    t = ((need - before) / slope.clamp(min=1e-12)).clamp(min=0)
    t = torch.where(first == knots.shape[1], torch.full_like(t, 1.0), t)
    return (direction * torch.minimum(room, t[:, None])).view(n, *z.shape[1:])

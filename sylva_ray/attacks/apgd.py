"""Auto-PGD (Croce and Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks"): PGD with momentum, whose step is halved, from the best point so far, whenever progress stalls.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.base import LinfOrL2Attack, register
from sylva_ray.attacks.losses import cross_entropy, dlr, targeted_dlr
from sylva_ray.attacks.norms import L2, NORMS, Linf
from sylva_ray.attacks.state import AttackState, Objective
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

MOMENTUM = 0.75
"""Share of the new step; the rest repeats the last one. (The paper's alpha; its code does the same.)"""
IMPROVED = 0.75
"""A step is kept while more than this share of the steps since the last checkpoint has raised the loss."""


@register
class ApgdAttack(LinfOrL2Attack):
    """``loss`` ce, dlr, or targeted (the DLR towards each of the ``targets`` likeliest wrong classes)."""

    name: Literal["apgd"] = "apgd"
    steps: int = Field(100, ge=1)
    restarts: int = Field(1, ge=1)
    loss: Literal["ce", "dlr", "targeted"] = "ce"
    targets: int = Field(9, ge=1)
    shown: ClassVar[str] = "APGD"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        options = (("targets", float(self.targets)),) if self.loss == "targeted" else ()
        return AttackSpec("apgd", self.epsilon, self.steps, 0.0, True, self.restarts, self.loss, self.norm, options)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Run ``spec.restarts`` times, towards each target where the loss is targeted."""
        if spec.loss == "targeted":
            ranked = ranked_targets(state.clean, state.y, int(cls.option(spec, "targets")))
            for stream_index in range(spec.restarts * len(ranked)):
                targets = ranked[stream_index % len(ranked)]
                _run_once(state, spec, draws, stream_index, _towards(state, targets))
            return
        loss = {"ce": cross_entropy, "dlr": dlr}[spec.loss]
        for restart in range(spec.restarts):
            _run_once(state, spec, draws, restart, lambda logits, rows: loss(logits, state.y[rows]))


def ranked_targets(clean: torch.Tensor, y: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The wrong classes of every image, the most likely first: at most ``count`` tensors ``[N]``."""
    wrong = clean.scatter(1, y[:, None], float("-inf"))
    order = wrong.argsort(dim=1, descending=True)
    return [order[:, k] for k in range(min(count, clean.shape[1] - 1))]


def _towards(state: AttackState, targets: torch.Tensor) -> Objective:
    return lambda logits, rows: targeted_dlr(logits, state.y[rows], targets[rows])


def checkpoints(steps: int) -> list[int]:
    """After which steps progress is looked at: 22, 41, 57, 70, ... of 100."""
    length, least, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, at = [], 0
    while at + length <= steps:
        at += length
        found.append(at)
        length = max(length - shrink, least)
    return found


def _run_once(state: AttackState, spec: AttackSpec, draws: ImageDraws, stream_index: int, objective: Objective) -> None:
    norm = NORMS[spec.norm]
    rows = state.remaining()
    if not len(rows):
        return
    x_adv = state.x[rows]
    direction = norm.surface(x_adv, draws.of(rows), stream_index)
    x_adv = norm.project(x_adv + spec.epsilon * direction, x_adv, spec.epsilon)
    value, gradient, _ = state.gradient(x_adv, rows, objective)
    path = _Path(
        previous=x_adv,
        x_adv=x_adv,
        gradient=gradient,
        value=value,
        best=x_adv,
        best_gradient=gradient,
        best_value=value,
        step=torch.full_like(value, 2 * spec.epsilon),
        rises=torch.zeros_like(value),
        value_at_check=value,
        halved_at_check=torch.ones_like(value, dtype=torch.bool),
    )
    checks, since = checkpoints(spec.steps), 0
    for step in range(spec.steps):
        keep = state.is_robust[rows]
        rows, path = rows[keep], path.at(keep)
        if not len(rows):
            return
        path = _advance(path, state.x[rows], norm, spec.epsilon, first=step == 0)
        value, gradient, _ = state.gradient(path.x_adv, rows, objective)
        path = _look(path, value, gradient)
        since += 1
        if step + 1 in checks:
            path = _check(path, since)
            since = 0


@dataclass(frozen=True)
class _Path:
    """Where the attack is on n images: ``[n, 3, H, W]`` the points and gradients, ``[n]`` the others.

    Attributes:
        previous, x_adv: the last two points.
        gradient, value: of the objective at ``x_adv``.
        best, best_gradient, best_value: the same at the best point so far.
        step: size of the next step.
        rises: how many steps since the last checkpoint raised the objective.
        value_at_check, halved_at_check: the best value at the last checkpoint, and whether the step was halved there.
    """

    previous: torch.Tensor
    x_adv: torch.Tensor
    gradient: torch.Tensor
    value: torch.Tensor
    best: torch.Tensor
    best_gradient: torch.Tensor
    best_value: torch.Tensor
    step: torch.Tensor
    rises: torch.Tensor
    value_at_check: torch.Tensor
    halved_at_check: torch.Tensor

    def at(self, keep: torch.Tensor) -> _Path:
        """Keep some of the images only."""
        return _Path(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})


def _advance(path: _Path, x: torch.Tensor, norm: Linf | L2, epsilon: float, first: bool) -> _Path:
    """Take a step along the gradient, mixed with the last one."""
    x_adv, weight = path.x_adv, 1.0 if first else MOMENTUM
    step = path.step.view(-1, 1, 1, 1)
    target = norm.project(x_adv + step * norm.ascent(path.gradient), x, epsilon)
    moved = norm.project(x_adv + weight * (target - x_adv) + (1 - weight) * (x_adv - path.previous), x, epsilon)
    return replace(path, previous=x_adv, x_adv=moved)


def _look(path: _Path, value: torch.Tensor, gradient: torch.Tensor) -> _Path:
    """Enter the objective at the new point."""
    better = value > path.best_value
    return replace(
        path,
        gradient=gradient,
        value=value,
        rises=path.rises + (value > path.value),
        best=_where(better, path.x_adv, path.best),
        best_gradient=_where(better, gradient, path.best_gradient),
        best_value=torch.where(better, value, path.best_value),
    )


def _check(path: _Path, since: int) -> _Path:
    """Halve the step and go back to the best point where progress stalls.

    It does where too few steps helped, or where the best has not changed since a checkpoint that kept the step.
    """
    stalled = (path.best_value <= path.value_at_check) & ~path.halved_at_check
    halved = (path.rises <= since * IMPROVED) | stalled
    return replace(
        path,
        step=torch.where(halved, path.step / 2, path.step),
        x_adv=_where(halved, path.best, path.x_adv),
        gradient=_where(halved, path.best_gradient, path.gradient),
        value_at_check=path.best_value,
        halved_at_check=halved,
        rises=torch.zeros_like(path.rises),
    )


def _where(mask: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.view(-1, 1, 1, 1), yes, no)

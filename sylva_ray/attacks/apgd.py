"""Auto-PGD (APGD): PGD with momentum and a step size that adapts to the progress of the loss.

Source: Croce and Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
Attacks". When progress stalls, the step size is halved and the search continues from the best point found so far.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from sylva_ray.attacks.base import LinfOrL2Attack, register
from sylva_ray.attacks.losses import cross_entropy, dlr, targeted_dlr
from sylva_ray.attacks.norms import L2, NORMS, Linf
from sylva_ray.attacks.state import AttackState, LogitLoss
from sylva_ray.core.lazy import torch
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

MOMENTUM = 0.75
"""Weight of the new step; the previous step has weight 1 - MOMENTUM (alpha in the paper)."""
MIN_SUCCESS_RATE = 0.75
"""The step size is kept if more than this fraction of the steps since the last checkpoint raised the loss (rho)."""


@register
class ApgdAttack(LinfOrL2Attack):
    """Settings of APGD.

    Attributes:
        loss: ``ce``, ``dlr``, or ``targeted`` (DLR towards each of the ``targets`` most likely wrong classes).
        targets: number of target classes; used by the targeted loss only.
    """

    name: Literal["apgd"] = "apgd"
    steps: Count = 100
    restarts: Count = 1
    loss: Literal["ce", "dlr", "targeted"] = "ce"
    targets: Count = 9
    display_name: ClassVar[str] = "APGD"

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        options = (("targets", float(self.targets)),) if self.loss == "targeted" else ()
        return AttackSpec(self.name, self.epsilon, self.steps, 0.0, True, self.restarts, self.loss, self.norm, options)

    @classmethod
    def min_classes(cls, spec: AttackSpec) -> int:
        """Return three for the DLR, four for the targeted DLR."""
        return {"dlr": 3, "targeted": 4}.get(spec.loss, super().min_classes(spec))

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Run APGD ``spec.restarts`` times; the targeted loss runs it so often for each target class."""
        if spec.loss == "targeted":
            ranked = ranked_targets(state.clean_logits, state.y, int(cls.option(spec, "targets")))
            for stream_index in range(spec.restarts * len(ranked)):
                targets = ranked[stream_index % len(ranked)]
                _run_once(state, spec, draws, stream_index, _targeted_loss(state, targets))
            return
        loss = {"ce": cross_entropy, "dlr": dlr}[spec.loss]
        for restart in range(spec.restarts):
            _run_once(state, spec, draws, restart, lambda logits, rows: loss(logits, state.y[rows]))


def ranked_targets(logits: torch.Tensor, y: torch.Tensor, max_targets: int) -> list[torch.Tensor]:
    """Rank the wrong classes of every image by their logits.

    Args:
        logits: ``[N, num_classes]`` of the clean images.
        y: labels ``[N]``.
        max_targets: how many classes to return at most.

    Returns:
        One tensor ``[N]`` of classes per rank, the most likely wrong class first.
    """
    wrong = logits.scatter(1, y[:, None], float("-inf"))
    order = wrong.argsort(dim=1, descending=True)
    return [order[:, k] for k in range(min(max_targets, logits.shape[1] - 1))]


def _targeted_loss(state: AttackState, targets: torch.Tensor) -> LogitLoss:
    return lambda logits, rows: targeted_dlr(logits, state.y[rows], targets[rows])


def checkpoints(steps: int) -> list[int]:
    """Return the numbers of the steps after which progress is checked, e.g. 22, 41, 57, 70, ... for 100 steps."""
    length, min_length, decrement = (max(int(fraction * steps), 1) for fraction in (0.22, 0.06, 0.03))
    numbers, number = [], 0
    while number + length <= steps:
        number += length
        numbers.append(number)
        length = max(length - decrement, min_length)
    return numbers


def _run_once(state: AttackState, spec: AttackSpec, draws: ImageDraws, stream_index: int, loss: LogitLoss) -> None:
    norm = NORMS[spec.norm]
    rows = state.remaining()
    if not len(rows):
        return
    x_adv = state.x[rows]
    direction = norm.surface(x_adv, draws.select(rows), stream_index)
    x_adv = norm.project(x_adv + spec.epsilon * direction, x_adv, spec.epsilon)
    value, gradient, _ = state.gradient(x_adv, rows, loss)
    path = _Trajectory(
        previous=x_adv,
        x_adv=x_adv,
        gradient=gradient,
        value=value,
        best=x_adv,
        best_gradient=gradient,
        best_value=value,
        step_size=torch.full_like(value, 2 * spec.epsilon),
        num_rises=torch.zeros_like(value),
        value_at_checkpoint=value,
        halved_at_checkpoint=torch.ones_like(value, dtype=torch.bool),
    )
    checkpoint_steps, steps_since_checkpoint = checkpoints(spec.steps), 0
    for step in range(spec.steps):
        keep = state.is_robust[rows]
        rows, path = rows[keep], path.select(keep)
        if not len(rows):
            return
        path = _advance(path, state.x[rows], norm, spec.epsilon, first=step == 0)
        value, gradient, _ = state.gradient(path.x_adv, rows, loss)
        path = _record_point(path, value, gradient)
        steps_since_checkpoint += 1
        if step + 1 in checkpoint_steps:
            path = _halve_stalled_steps(path, steps_since_checkpoint)
            steps_since_checkpoint = 0
    if state.precision is not None:  # another precision than that of the model, which may answer wrongly at this point
        keep = state.is_robust[rows]
        with state.at_model_precision():
            state.logits(path.best[keep], rows[keep])


@dataclass(frozen=True)
class _Trajectory:
    """The state of the optimisation on n images. Points and gradients are ``[n, 3, H, W]``, the others ``[n]``.

    Attributes:
        previous: the point before ``x_adv``.
        x_adv: the current point.
        gradient: of the loss at ``x_adv``.
        value: of the loss at ``x_adv``.
        best: the point with the largest loss so far.
        best_gradient: of the loss at ``best``.
        best_value: of the loss at ``best``.
        step_size: of the next step, in the norm of the attack.
        num_rises: how many steps since the last checkpoint raised the loss.
        value_at_checkpoint: ``best_value`` at the last checkpoint.
        halved_at_checkpoint: whether the step size was halved at the last checkpoint.
    """

    previous: torch.Tensor
    x_adv: torch.Tensor
    gradient: torch.Tensor
    value: torch.Tensor
    best: torch.Tensor
    best_gradient: torch.Tensor
    best_value: torch.Tensor
    step_size: torch.Tensor
    num_rises: torch.Tensor
    value_at_checkpoint: torch.Tensor
    halved_at_checkpoint: torch.Tensor

    def select(self, keep: torch.Tensor) -> _Trajectory:
        """Return the trajectory of the images in the mask ``keep``."""
        return _Trajectory(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})


def _advance(path: _Trajectory, x: torch.Tensor, norm: Linf | L2, epsilon: float, first: bool) -> _Trajectory:
    """Take a step along the gradient, combined with the previous step."""
    x_adv, weight = path.x_adv, 1.0 if first else MOMENTUM
    step_size = path.step_size.view(-1, 1, 1, 1)
    target = norm.project(x_adv + step_size * norm.ascent(path.gradient), x, epsilon)
    moved = norm.project(x_adv + weight * (target - x_adv) + (1 - weight) * (x_adv - path.previous), x, epsilon)
    return replace(path, previous=x_adv, x_adv=moved)


def _record_point(path: _Trajectory, value: torch.Tensor, gradient: torch.Tensor) -> _Trajectory:
    """Record the loss and the gradient at the current point."""
    better = value > path.best_value
    return replace(
        path,
        gradient=gradient,
        value=value,
        num_rises=path.num_rises + (value > path.value),
        best=_where(better, path.x_adv, path.best),
        best_gradient=_where(better, gradient, path.best_gradient),
        best_value=torch.where(better, value, path.best_value),
    )


def _halve_stalled_steps(path: _Trajectory, steps_since_checkpoint: int) -> _Trajectory:
    """Halve the step size and return to the best point where progress has stalled.

    Progress has stalled if too few steps since the last checkpoint raised the loss, or if the best value has not
    changed although the step size was kept at the last checkpoint.
    """
    stalled = (path.best_value <= path.value_at_checkpoint) & ~path.halved_at_checkpoint
    halved = (path.num_rises <= steps_since_checkpoint * MIN_SUCCESS_RATE) | stalled
    return replace(
        path,
        step_size=torch.where(halved, path.step_size / 2, path.step_size),
        x_adv=_where(halved, path.best, path.x_adv),
        gradient=_where(halved, path.best_gradient, path.gradient),
        value_at_checkpoint=path.best_value,
        halved_at_checkpoint=halved,
        num_rises=torch.zeros_like(path.num_rises),
    )


def _where(mask: torch.Tensor, if_true: torch.Tensor, if_false: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.view(-1, 1, 1, 1), if_true, if_false)

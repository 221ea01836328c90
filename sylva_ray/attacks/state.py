"""What every evaluation attack works on: the images of a stack of clients, and which of them are still robust.

An attack asks an `AttackState` for logits and gradients, and every point that it asks about is recorded: where it lies
within the budget and its owner's model answers wrongly, the attack has succeeded on that image, which leaves it. So
success is per image, the worst case over attacks is per image, and a cascade is several attacks on one state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias

from sylva_ray.attacks.norms import LENGTHS
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import at_precision
from sylva_ray.core.types import ParameterStack

Objective: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""``(logits [n, num_classes], rows [n]) -> [n]``: what an attack maximises."""

SLACK = 1e-6
"""Rounding that a distance may exceed epsilon by."""


class AttackedModel(Protocol):
    """What an attack needs of a stack of models; `sylva_ray.models.cohort.CohortModel` is one."""

    precision: torch.dtype

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[N, num_classes]`` of every image under its owner's parameters."""
        ...


class AttackState:
    """One attack (or cascade) on N images of C clients.

    Args:
        model, params, owner: the stack; ``owner [N]`` sorted, on the CPU.
        x, y: ``[N, 3, H, W]`` in [0, 1] and ``[N]``.
        epsilon, norm: the budget; infinite for attacks that look for the nearest adversarial image.
        precision: in which the attack computes; None: in the model's own. Whatever it is, a success counts only where
            the model's own precision confirms it, and what is not confirmed is attacked further.

    Attributes:
        answers: ``[N]``, the wrong class where the attack succeeded, else the label.
        x_adv: ``[N, 3, H, W]``, the nearest adversarial image found, else the image.
        distance: ``[N]``, of that point, in ``norm``; infinite where there is none.
        is_robust: ``[N] bool``, where no attack has succeeded yet.
        forwards, backwards: images that went through the model.
        clean: ``[N, num_classes]`` logits of the images themselves; a misclassified one is a success at distance 0.
    """

    def __init__(
        self,
        model: AttackedModel,
        params: ParameterStack,
        x: torch.Tensor,
        y: torch.Tensor,
        owner: torch.Tensor,
        epsilon: float = float("inf"),
        norm: str = "linf",
        precision: torch.dtype | None = None,
    ) -> None:
        self.model, self.params, self.owner = model, {n: v.detach() for n, v in params.items()}, owner
        self.x, self.y = x, y
        self.epsilon, self.norm = epsilon, LENGTHS[norm]
        self.precision = precision if precision is not None and precision != model.precision else None
        self.answers, self.x_adv = y.clone(), x.clone()
        self.distance = torch.full((len(x),), float("inf"), device=x.device, dtype=x.dtype)
        self.is_robust = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.forwards = self.backwards = 0
        with self.exact():
            self.clean = self.logits(x, torch.arange(len(x), device=x.device))

    def remaining(self) -> torch.Tensor:
        """Return the rows of the images that are robust so far, ascending."""
        return self.is_robust.nonzero()[:, 0]

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Compute in the model's own precision inside the block."""
        precision, self.precision = self.precision, None
        try:
            yield
        finally:
            self.precision = precision

    def logits(self, x_adv: torch.Tensor, rows: torch.Tensor, record: bool = True) -> torch.Tensor:
        """Return ``[n, num_classes]`` of points for the images in ``rows`` (ascending).

        Args:
            record: whether the points count as tried, so that the attack succeeds where they are adversarial.
        """
        with torch.no_grad():
            logits = self._forward(x_adv, rows)
            return self._record_successes(x_adv, rows, logits) if record else logits

    def gradient(
        self, x_adv: torch.Tensor, rows: torch.Tensor, objective: Objective, record: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the objective ``[n]`` at the points, its gradient ``[n, 3, H, W]`` there, and the logits."""
        with torch.enable_grad():
            leaf = x_adv.detach().requires_grad_()
            logits = self._forward(leaf, rows)
            values = objective(logits, rows)
            gradient = None
            if values.requires_grad:
                (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
            if gradient is None:  # a model that hides it; check S10 says so
                gradient = torch.zeros_like(leaf)
        self.backwards += len(rows)
        logits = logits.detach()
        if record:
            with torch.no_grad():
                logits = self._record_successes(x_adv.detach(), rows, logits)
        return values.detach(), gradient, logits

    def _forward(self, x_adv: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.forwards += len(rows)
        with at_precision(self.model, self.precision):
            return self.model.forward(self.params, x_adv, self.owner[rows.cpu()])

    def _record_successes(self, x_adv: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Enter the points that lie within the budget and are answered wrongly.

        Returns:
            The logits, in the model's own precision where they were confirmed.
        """
        length = self.norm.length(x_adv - self.x[rows])
        in_range = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
        near = (length <= self.epsilon + SLACK) & (length < self.distance[rows])
        wins = (logits.argmax(1) != self.y[rows]) & in_range & near
        if self.precision is not None and wins.any():
            with self.exact():
                logits = logits.index_put((wins,), self._forward(x_adv[wins], rows[wins]))
            wins = wins & (logits.argmax(1) != self.y[rows])
        if wins.any():
            won = rows[wins]
            self.answers[won] = logits[wins].argmax(1)
            self.distance[won] = length[wins].to(self.distance.dtype)
            self.x_adv[won] = x_adv[wins]
            self.is_robust[won] = False
        return logits

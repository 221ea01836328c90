"""What every evaluation attack works on: the images of a stack of clients, and which of them still stand.

An attack is a function ``(search, spec, draws)``. It asks the search for logits and gradients; every point that it asks about
counts: where it lies within the budget and its owner's model answers wrongly, the image has fallen and leaves the attack.
So the success is per image, the worst case over attacks is per image, and a cascade is several attacks on one search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sylva_ray.attacks.norms import LENGTHS
from sylva_ray.core.precision import at_precision
from sylva_ray.core.types import ParameterStack
from sylva_ray.models.cohort import CohortModel

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(logits [n, num_classes], rows [n]) -> [n]``: what an attack maximises."""

SLACK = 1e-6
"""Rounding that a distance may exceed epsilon by."""


class Search:
    """One attack (or cascade) on N images of C clients.

    Args:
        model, params, owner: the cohort; ``owner [N]`` sorted, on the CPU.
        x, y: ``[N, 3, H, W]`` in [0, 1] and ``[N]``.
        epsilon, norm: the budget; infinite for attacks that look for the nearest adversarial image.
        precision: in which the attack computes; None: in the model's own. Whatever it is, an image falls only where the model's
            own precision confirms it, and what is not confirmed is attacked further.

    Attributes:
        answers: ``[N]``, a wrong class where the image has fallen, else the label.
        x_adv: ``[N, 3, H, W]``, the nearest point found at which it fell, else the image.
        distance: ``[N]``, of that point, in ``norm``; infinite where the image stands.
        stands: ``[N] bool``.
        forwards, backwards: images that went through the model.
        clean: ``[N, num_classes]`` logits of the images themselves; an image that is misclassified falls at distance 0.
    """

    def __init__(
        self,
        model: CohortModel,
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
        self.stands = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.forwards = self.backwards = 0
        with self.exact():
            self.clean = self.logits(x, torch.arange(len(x), device=x.device))

    def alive(self) -> torch.Tensor:
        """Rows of the images that stand, ascending."""
        return self.stands.nonzero()[:, 0]

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Compute in the model's own precision inside the block."""
        precision, self.precision = self.precision, None
        try:
            yield
        finally:
            self.precision = precision

    @torch.no_grad()
    def logits(self, x_adv: torch.Tensor, rows: torch.Tensor, counts: bool = True) -> torch.Tensor:
        """``[n, num_classes]`` of points for the images in ``rows`` (ascending); with ``counts`` they may make them fall."""
        logits = self._forward(x_adv, rows)
        return self._look(x_adv, rows, logits) if counts else logits

    def gradient(
        self, x_adv: torch.Tensor, rows: torch.Tensor, objective: Objective, counts: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The objective ``[n]`` at the points, its gradient ``[n, 3, H, W]`` there, and the logits."""
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
        return values.detach(), gradient, self._look(x_adv.detach(), rows, logits) if counts else logits

    def _forward(self, x_adv: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.forwards += len(rows)
        with at_precision(self.model, self.precision):
            return self.model.forward(self.params, x_adv, self.owner[rows.cpu()])

    @torch.no_grad()
    def _look(self, x_adv: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Let images fall whose points lie within the budget and are answered wrongly; returns the logits, exact where they
        were checked."""
        length = self.norm.length(x_adv - self.x[rows])
        in_range = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
        near = (length <= self.epsilon + SLACK) & (length < self.distance[rows])
        wins = (logits.argmax(1) != self.y[rows]) & in_range & near
        if self.precision is not None and wins.any():
            with self.exact():
                logits = logits.index_put((wins,), self._forward(x_adv[wins], rows[wins]))
            wins = wins & (logits.argmax(1) != self.y[rows])
        if wins.any():
            fallen = rows[wins]
            self.answers[fallen] = logits[wins].argmax(1)
            self.distance[fallen] = length[wins].to(self.distance.dtype)
            self.x_adv[fallen] = x_adv[wins]
            self.stands[fallen] = False
        return logits

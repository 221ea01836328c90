"""The state of an evaluation attack: the images of a stack of clients, and which of them are still robust.

An attack computes logits and gradients through `AttackState`, which checks every point: if it is within the budget and
misclassified by the model of the client that owns the image, the attack has succeeded on that image, which is then not
attacked further. Several attacks on one state form a cascade.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias

from sylva_ray.attacks.norms import LENGTHS
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import at_precision
from sylva_ray.core.types import ClientImages, ParameterStack

LogitLoss: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""``(logits [n, num_classes], rows [n]) -> [n]``: the per-image loss that an attack maximises."""


NO_ANSWER = -1
"""The prediction of a model whose logits are not numbers; it is no class, and so always wrong."""


def predicted_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return the class of the largest logit ``[n]`` of ``logits [n, num_classes]``, `NO_ANSWER` where one is NaN."""
    return torch.where(logits.isnan().any(1), NO_ANSWER, logits.argmax(1))


class AttackedModel(Protocol):
    """The interface of a stack of models that attacks use; see `sylva_ray.models.cohort.CohortModel`."""

    precision: torch.dtype

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[N, num_classes]`` of every image, computed with the parameters of its owner."""
        ...


class AttackState:
    """An attack, or a cascade of attacks, on N images of C clients.

    Args:
        model: the stack of models.
        params: the parameters of the C clients.
        images: the images of the C clients.
        epsilon: the budget, in the units of ``norm``; infinite: search for the nearest adversarial image.
        norm: a key of `LENGTHS`.
        precision: floating-point format of the forwards; None: the precision of the model. A success in another
            precision counts only if the precision of the model confirms it.

    Attributes:
        x: the images, ``[N, 3, H, W]``.
        y: the labels, ``[N]``.
        predictions: ``[N]``, the wrong class where the attack succeeded, else the label.
        x_adv: ``[N, 3, H, W]``, the nearest adversarial image found, else the image. With a budget it is usually the
            first one: attacks go on with the images that are still robust.
        distance: ``[N]``, distance of ``x_adv`` from the image; infinite where no adversarial image was found.
        is_robust: ``[N] bool``, True where no attack has succeeded yet.
        forwards: number of images that were passed forward through the model.
        backwards: number of images that were passed backward through the model.
        clean_logits: ``[N, num_classes]`` of the images; a misclassified image is a success at distance 0.
    """

    def __init__(
        self,
        model: AttackedModel,
        params: ParameterStack,
        images: ClientImages,
        epsilon: float = float("inf"),
        norm: str = "linf",
        precision: torch.dtype | None = None,
    ) -> None:
        self.model, self.params = model, {n: v.detach() for n, v in params.items()}
        self.x, self.y, self.owner = images.x, images.y, images.owner
        self.epsilon, self.norm = epsilon, LENGTHS[norm]
        self.precision = precision if precision is not None and precision != model.precision else None
        self.predictions, self.x_adv = self.y.clone(), self.x.clone()
        count, device = len(images), self.x.device
        self.clean_logits = self.x.new_empty(0, 0)
        self.distance = torch.full((count,), float("inf"), device=device, dtype=self.x.dtype)
        self.is_robust = torch.ones(count, dtype=torch.bool, device=device)
        self.forwards = self.backwards = 0
        with self.at_model_precision():
            self.clean_logits = self.logits(self.x, torch.arange(count, device=device))

    def remaining(self) -> torch.Tensor:
        """Return the rows of the images that are still robust, in ascending order."""
        return self.is_robust.nonzero()[:, 0]

    @contextmanager
    def at_model_precision(self) -> Iterator[None]:
        """Compute in the precision of the model inside the ``with`` block."""
        precision, self.precision = self.precision, None
        try:
            yield
        finally:
            self.precision = precision

    def logits(self, x_adv: torch.Tensor, rows: torch.Tensor, record: bool = True) -> torch.Tensor:
        """Compute the logits at points.

        Args:
            x_adv: the points ``[n, 3, H, W]``.
            rows: the rows of their images ``[n]``, ascending.
            record: whether the attack succeeds where the points are adversarial.

        Returns:
            ``[n, num_classes]``.
        """
        with torch.no_grad():
            logits = self._forward(x_adv, rows)
            return self._record_successes(x_adv, rows, logits) if record else logits

    def gradient(
        self, x_adv: torch.Tensor, rows: torch.Tensor, loss: LogitLoss, record: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute a loss and its gradient with respect to the images at points.

        Args:
            x_adv: the points ``[n, 3, H, W]``.
            rows: the rows of their images ``[n]``, ascending.
            loss: per-image loss.
            record: whether the attack succeeds where the points are adversarial.

        Returns:
            The loss ``[n]``, its gradient ``[n, 3, H, W]`` and the logits ``[n, num_classes]``. The gradient is zero if
            the model returns logits that do not depend differentiably on the images, and in the entries where it is
            NaN; infinite entries get the largest finite size of their image. So the attack can go on; check S10 reports
            all three.
        """
        with torch.enable_grad():
            leaf = x_adv.detach().requires_grad_()
            logits = self._forward(leaf, rows)
            values = loss(logits, rows)
            gradient = None
            if values.requires_grad:
                (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
            if gradient is None:
                gradient = torch.zeros_like(leaf)
        self.backwards += len(rows)
        logits = logits.detach()
        if record:
            with torch.no_grad():
                logits = self._record_successes(x_adv.detach(), rows, logits)
        return values.detach(), _finite(gradient), logits

    def _forward(self, x_adv: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if not len(rows):
            return self.clean_logits[:0]
        self.forwards += len(rows)
        with at_precision(self.model, self.precision):
            return self.model.forward(self.params, x_adv, self.owner[rows.cpu()])

    def _record_successes(self, x_adv: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Record the points that are in the pixel range, within the budget, and misclassified.

        Returns:
            The logits; where a success had to be confirmed, those of the precision of the model.
        """
        length = self.norm.length(x_adv - self.x[rows])
        in_range = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
        is_nearer = (length <= self.epsilon + self.norm.slack(self.epsilon)) & (length < self.distance[rows])
        succeeded = (predicted_classes(logits) != self.y[rows]) & in_range & is_nearer
        if self.precision is not None and succeeded.any():
            with self.at_model_precision():
                logits = logits.index_put((succeeded,), self._forward(x_adv[succeeded], rows[succeeded]))
            succeeded = succeeded & (predicted_classes(logits) != self.y[rows])
        if succeeded.any():
            broken = rows[succeeded]
            self.predictions[broken] = predicted_classes(logits[succeeded])
            self.distance[broken] = length[succeeded].to(self.distance.dtype)
            self.x_adv[broken] = x_adv[succeeded]
            self.is_robust[broken] = False
        return logits


def _finite(gradient: torch.Tensor) -> torch.Tensor:
    """Replace NaN by 0, and infinite entries by the largest finite size in their image, 1 where there is none."""
    is_finite = gradient.isfinite()
    if is_finite.all():
        return gradient
    largest = torch.where(is_finite, gradient, 0).flatten(1).abs().amax(1)
    largest = torch.where(largest > 0, largest, 1).view(-1, 1, 1, 1)
    return torch.where(is_finite, gradient, torch.where(gradient.isnan(), 0, gradient).sign() * largest)

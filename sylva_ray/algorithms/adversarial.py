"""Adversarial training: losses per image, the crafting of their images, class-balanced weights, a base for methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from sylva_ray.attacks.losses import boosted_cross_entropy, cross_entropy, kl_divergence, true_class_probability
from sylva_ray.attacks.pgd import pgd
from sylva_ray.core.lazy import torch
from sylva_ray.core.sections import Section, conflict
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.contract import Algorithm


def craft_ce(context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
    """Craft images by PGD on the cross-entropy, ``[N, 3, H, W]``."""

    def craft(own: ParameterStack, part: Batch, _rows: slice) -> torch.Tensor:
        def objective(x: torch.Tensor) -> torch.Tensor:
            return cross_entropy(context.model.forward(own, x, part.owner), part.y)

        return pgd(objective, part.x, attack, part.noise)

    with context.stopwatch("attack"):
        return context.in_windows(detached(params), batch, craft)


def craft_kl(
    context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec, offset: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Craft images by PGD on the divergence from the clean prediction, which is computed once.

    PGD always starts at random: at the clean image the divergence has no gradient.

    Args:
        context: of the cohort.
        params: of the cohort.
        batch: the images.
        attack: its settings.
        offset: added to all logits; a number, or ``[N, num_classes]``.
    """
    attack = replace(attack, random_start=True)

    def craft(own: ParameterStack, part: Batch, rows: slice) -> torch.Tensor:
        shift = offset[rows] if isinstance(offset, torch.Tensor) else offset
        with torch.no_grad():
            clean = context.model.forward(own, part.x, part.owner) + shift

        def objective(x: torch.Tensor) -> torch.Tensor:
            return kl_divergence(clean, context.model.forward(own, x, part.owner) + shift)

        return pgd(objective, part.x, attack, part.noise)

    with context.stopwatch("attack"):
        return context.in_windows(detached(params), batch, craft)


def ce_adv(
    context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, beta: float = 0.0
) -> torch.Tensor:
    """Return CE(z(x'), y) (Madry et al. 2018); ``beta`` is not used."""
    del beta
    return cross_entropy(context.model.forward(params, x_adv, batch.owner), batch.y)


def trades(
    context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return CE(z(x), y) + beta KL(p(x) || p(x')), x' by PGD on the KL (TRADES, Zhang et al. 2019).

    The paper has beta = 6. The gradient flows through both arguments of the KL, as in the authors' code.
    """
    clean = context.model.forward(params, batch.x, batch.owner)
    moved = context.model.forward(params, x_adv, batch.owner)
    return cross_entropy(clean, batch.y) + beta * kl_divergence(clean, moved)


def mart(
    context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return BCE(x', y) + beta KL(p(x) || p(x')) (1 - p_y(x)), x' by PGD on the CE.

    This is MART (Wang et al. 2020); the paper has beta = 5.
    """
    clean = context.model.forward(params, batch.x, batch.owner)
    moved = context.model.forward(params, x_adv, batch.owner)
    error_probability = 1 - true_class_probability(clean, batch.y)
    return boosted_cross_entropy(moved, batch.y) + beta * kl_divergence(clean, moved) * error_probability


@dataclass(frozen=True)
class AdversarialLoss:
    """A loss and how its images are crafted.

    Attributes:
        craft: ``(context, params, batch, attack) -> x_adv [N, 3, H, W]``.
        loss: ``(context, params, batch, x_adv, beta) -> [N]``.
    """

    craft: Callable[[ClientContext, ParameterStack, Batch, AttackSpec], torch.Tensor]
    loss: Callable[[ClientContext, ParameterStack, Batch, torch.Tensor, float], torch.Tensor]


ADVERSARIAL_LOSSES = {
    "ce_adv": AdversarialLoss(craft_ce, ce_adv),
    "trades": AdversarialLoss(craft_kl, trades),
    "mart": AdversarialLoss(craft_ce, mart),
}


class AdversarialTraining(Algorithm):
    """A method whose clients train on a loss of `ADVERSARIAL_LOSSES`, or on one of their own (`robust_losses`)."""

    class Parameters(Algorithm.Parameters):
        """The loss, the weight of its robust term, and two options."""

        loss: Literal["ce_adv", "trades", "mart"] = "ce_adv"
        beta: float = Field(6.0, ge=0, description="weight of the robust term in trades and mart")
        benign_weight: float = Field(0.0, ge=0, description="adds that much benign cross-entropy")
        class_balance: float = Field(
            0.0,
            ge=0,
            lt=1,
            description="effective-number beta of the class weights, 0: off, 0.999: strong; benign epochs of phase 2 "
            "adjust logits by these weights",
        )

    parameters: Parameters

    def craft(self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """Craft images in the way of the chosen loss."""
        return ADVERSARIAL_LOSSES[self.parameters.loss].craft(context, params, batch, attack)

    def sample_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """Return omega_y [robust loss + benign_weight CE(z(x), y)] of every image, ``[N]``."""
        p = self.parameters
        losses = self.robust_losses(context, params, batch, x_adv)
        if p.benign_weight:
            clean = context.model.forward(params, batch.x, batch.owner)
            losses = losses + p.benign_weight * cross_entropy(clean, batch.y)
        return self._balanced(context, batch, losses)

    def refinement_losses(self, context: ClientContext, params: ParameterStack, batch: Batch) -> torch.Tensor:
        """Return CE(z(x), y) of every image, ``[N]``; with ``class_balance`` CE(z(x) - log omega, y).

        The weighted loss omega_y CE(z(x), y) has the same minimiser, log p(y | x) + log omega. But its weights have no
        effect on images that are fitted already, as the few images of rare classes soon are; adjusted logits go on
        having one (Menon et al. 2021, where omega is 1 / n: the limit for ``class_balance`` -> 1).
        """
        if not self.parameters.class_balance:
            return super().refinement_losses(context, params, batch)
        logits = context.model.forward(params, batch.x, batch.owner)
        weights = class_weights(context.class_counts.clamp(min=1), self.parameters.class_balance)
        return cross_entropy(logits - context.to_images(weights.log().to(logits.dtype), batch), batch.y)

    def image_weights(self, class_counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return omega_y of held-out images, as in the loss; a class without a training image counts as with one."""
        if not self.parameters.class_balance or not len(labels):
            return super().image_weights(class_counts, labels)
        weights = class_weights(torch.from_numpy(class_counts)[None].clamp(min=1), self.parameters.class_balance)[0]
        own = weights.numpy()[labels]
        return np.asarray(own / own.mean())

    def _balanced(self, context: ClientContext, batch: Batch, losses: torch.Tensor) -> torch.Tensor:
        """Return ``losses [N]`` times the weights of their classes."""
        if not self.parameters.class_balance:
            return losses
        weights = class_weights(context.class_counts, self.parameters.class_balance)
        return losses * weights[batch.device_owner, batch.y].to(losses.dtype)

    def robust_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """Return the robust loss of every image, ``[N]``; a method with its own loss overrides this."""
        return ADVERSARIAL_LOSSES[self.parameters.loss].loss(context, params, batch, x_adv, self.parameters.beta)


class OwnLoss(Section):
    """Mixin for the parameters of a method with its own loss, which refuses another value of ``loss``."""

    @model_validator(mode="after")
    def _loss_would_have_no_effect(self) -> Self:
        loss = getattr(self, "loss", "ce_adv")
        if loss != "ce_adv":
            raise conflict("loss", loss, "has no effect here: this method has a loss of its own")
        return self


def class_weights(class_counts: torch.Tensor, beta: float) -> torch.Tensor:
    """Return effective-number weights (Cui et al. 2019), ``[C, num_classes]``, from counts of the same shape.

    omega_c = (1 - beta) / (1 - beta^n_c), 0 for absent classes, scaled such that the weights of the present classes sum
    to their number. With beta = 0 all classes have the same weight; for beta -> 1 weights are proportional to 1 / n_c.
    """
    counts = class_counts.double()
    present = counts > 0
    if beta == 0:
        return present.double()
    raw = torch.where(present, (1 - beta) / (1 - beta ** counts.clamp(min=1)), 0.0)
    return raw * present.sum(1, keepdim=True) / raw.sum(1, keepdim=True)


def detached(params: ParameterStack) -> ParameterStack:
    """Return the parameters without gradients, for attacks and teachers."""
    return {name: value.detach() for name, value in params.items()}

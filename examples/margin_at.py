"""Margin-AT: adversarial training on the margin between the true logit and the best wrong one.

A class of n_c images gets the margin width / n_c^(1/4), as in LDAM (Cao et al. 2019): under label skew, rare classes
are the easiest to attack. Clients are weighted by the square root of their images, so that a large client does not
dominate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from sylva_ray.algorithms.adversarial import detached
from sylva_ray.attacks.losses import margin
from sylva_ray.attacks.pgd import pgd
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.federation.context import Batch, ClientContext, RoundUploads
from sylva_ray.federation.contract import Algorithm


class MarginAT(Algorithm):
    """softplus(best wrong logit - true logit + width / n_y^(1/4)) at x', which maximises that difference."""

    name = "margin_at"

    class Parameters(Algorithm.Parameters):
        """Adds ``width``; adapters are shared and heads personal, as in the base method."""

        width: float = Field(4.0, ge=0, description="logits by which a class of one image must win")

    parameters: Parameters

    def craft(self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """Run PGD on the margin, without a gradient for the weights."""
        frozen = detached(params)

        def objective(x: torch.Tensor) -> torch.Tensor:
            return margin(context.model.forward(frozen, x, batch.owner), batch.y)

        with context.stopwatch("attack"):
            return pgd(objective, batch.x, attack, batch.noise)

    def sample_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of every image; the class counts are those of the client that owns it."""
        counts = context.to_images(context.class_counts, batch).gather(1, batch.y[:, None])[:, 0]
        wanted = self.parameters.width * counts.clamp(min=1).to(x_adv.dtype) ** -0.25
        return F.softplus(margin(context.model.forward(params, x_adv, batch.owner), batch.y) + wanted)

    def client_weights(self, uploads: RoundUploads, clients: Sequence[int]) -> np.ndarray:
        """Return the square roots of the numbers of images."""
        weights: np.ndarray = np.sqrt(super().client_weights(uploads, clients))
        return weights

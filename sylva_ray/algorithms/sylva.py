"""Sylva (CCS 2025, arXiv 2506.05402): LoRA adversarial fine-tuning, then a layer game that refines on benign data.

From the abstract: phase 1 fine-tunes LoRA adversarially on every client and uploads the LoRA parameters alone; phase 2
selects layers by a cooperative game and refines them for benign accuracy. Our choices, where we know no more than that:
the loss and its class balancing, product-SVD aggregation among ball-tree neighbours with local heads, the warm-up, and all
of phase 2's constants. ``sylva_paper_like`` keeps naive averaging of the factors over everybody.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from sylva_ray.algorithms.adversarial import AdversarialTraining, class_weights
from sylva_ray.algorithms.base import Batch, Cohort, Phase2Parameters, Sharing
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.types import ParameterStack


class Sylva(AdversarialTraining):
    """Class-balanced adversarial training of adapters that are shared among neighbours; heads stay at home."""

    name = "sylva"

    class Parameters(AdversarialTraining.Parameters):
        """``benign_weight`` adds that much benign cross-entropy (0: none)."""

        benign_weight: float = Field(0.0, ge=0)
        class_balance: float = Field(0.0, ge=0, lt=1, description="effective-number beta; 0: off, 0.999: strong")
        adapters: Sharing = "neighbours"
        phase2: Phase2Parameters = Phase2Parameters()

    parameters: Parameters

    def sample_losses(self, cohort: Cohort, params: ParameterStack, batch: Batch, x_adv: torch.Tensor) -> torch.Tensor:
        """omega_y [loss(x, x') + benign_weight CE(z(x), y)], per image."""
        p = self.parameters
        losses = super().sample_losses(cohort, params, batch, x_adv)
        if p.benign_weight:
            clean = cohort.model.forward(params, batch.x, batch.owner)
            losses = losses + p.benign_weight * cross_entropy(clean, batch.y)
        if p.class_balance:
            weights = class_weights(cohort.class_counts, p.class_balance)
            losses = losses * weights[batch.owner.to(weights.device), batch.y].to(losses.dtype)
        return losses


class SylvaPaperLike(Sylva):
    """The literal reading of the abstract: factors averaged separately, over the whole fleet (biased: Sum BA != BA)."""

    name = "sylva_paper_like"

    class Parameters(Sylva.Parameters):
        """Only the aggregation differs."""

        adapters: Sharing = "global"
        factor_rule: Literal["product_svd", "naive"] = "naive"

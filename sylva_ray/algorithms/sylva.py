"""Sylva (CCS 2025, arXiv 2506.05402): LoRA adversarial fine-tuning, then a layer game that refines on benign data.

From the abstract: phase 1 fine-tunes LoRA adversarially on every client and uploads the LoRA parameters alone; phase 2
selects layers by a cooperative game and refines them for benign accuracy. Our choices, where we know no more than that:
the loss and its class balancing, product-SVD aggregation among ball-tree neighbours with local heads, the warm-up, and all
of phase 2's constants. ``sylva_paper_like`` keeps naive averaging of the factors over everybody.
"""

from __future__ import annotations

from typing import Literal

from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.federation.parameters import Phase2Parameters, Sharing


class Sylva(AdversarialTraining):
    """Adversarial training of adapters that are shared among neighbours; heads stay at home."""

    name = "sylva"

    class Parameters(AdversarialTraining.Parameters):
        """Adapters are shared among neighbours, and there is a second phase."""

        adapters: Sharing = "neighbours"
        phase2: Phase2Parameters = Phase2Parameters()

    parameters: Parameters


class SylvaPaperLike(Sylva):
    """The literal reading of the abstract: factors averaged separately, over the whole fleet (biased: Sum BA != BA)."""

    name = "sylva_paper_like"

    class Parameters(Sylva.Parameters):
        """Only the aggregation differs."""

        adapters: Sharing = "global"
        factor_rule: Literal["product_svd", "naive"] = "naive"

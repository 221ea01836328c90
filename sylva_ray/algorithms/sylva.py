"""Sylva (CCS 2025, arXiv 2506.05402): LoRA adversarial fine-tuning, then a layer game that refines on benign data.

From the abstract: phase 1 fine-tunes LoRA adversarially on every client and uploads the LoRA parameters only; phase 2
selects layers by a cooperative game and refines them for benign accuracy. We know no more of the paper. Our choices are
the loss (cross-entropy on PGD's images; by default ``class_balance`` is off), product-SVD aggregation of everybody's
adapters and averages of everybody's heads, both tuned at home afterwards and mixed with what was received, the warm-up,
and all constants of phase 2.
``sylva_paper_like`` averages the factors naively, and its heads stay with the clients.
"""

from __future__ import annotations

from typing import Literal

from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.federation.parameters import MixtureParameters, Phase2Parameters, Sharing
from sylva_ray.federation.stages.federated_round import federated_rounds
from sylva_ray.federation.stages.layer_game.phase import game_and_refinement
from sylva_ray.federation.stages.mixture.stage import final_epochs
from sylva_ray.federation.stages.stage import Stage
from sylva_ray.federation.stages.warm_up import WarmUp


class Sylva(AdversarialTraining):
    """Adapters trained adversarially by all clients and tuned by each; a layer game then raises benign accuracy."""

    name = "sylva"
    papers = (
        "Qi et al. 2025, Sylva: Tailoring Personalized Adversarial Defense in Pre-trained Models via Collaborative "
        "Fine-tuning, ACM CCS, arXiv 2506.05402v1",
    )

    class Parameters(AdversarialTraining.Parameters):
        """Adapters and heads of everybody, a mixture, and a phase 2."""

        heads: Sharing = "global"
        mixture: MixtureParameters = MixtureParameters()
        phase2: Phase2Parameters = Phase2Parameters()

    parameters: Parameters

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return adversarial rounds, local epochs and a mixture, then a game over layers and their refinement."""
        return [
            WarmUp(),
            *federated_rounds(config),
            *final_epochs(self.parameters),
            *game_and_refinement(self.parameters.phase2),
        ]


class SylvaPaperLike(Sylva):
    """Sylva, read literally: the LoRA factors A and B are averaged separately, and heads stay on their clients."""

    name = "sylva_paper_like"
    papers = Sylva.papers

    class Parameters(Sylva.Parameters):
        """Naive averages over all clients, and no mixture."""

        heads: Sharing = "local"
        mixture: MixtureParameters = MixtureParameters(enabled=False)
        factor_rule: Literal["product_svd", "naive"] = "naive"

"""Lorica (arXiv 2506.05402v3), the successor of Sylva.

From the abstract: LoRA-FA, of which only B is uploaded, ball-tree neighbours, an adaptive loss, forward gating of the
layers in phase 2, and Byzantine clients. The form of the loss and of the gates is our choice (docs/choices.md). A is
frozen with orthogonal rows, so averages, distances and clipping of B are those of the models.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sylva_ray.algorithms.adversarial import AdversarialTraining, OwnLoss, craft_ce
from sylva_ray.attacks.losses import cross_entropy, kl_divergence
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.parameters import Phase2Parameters, RobustParameters, Sharing
from sylva_ray.federation.stages.layer_game.phase import game_and_refinement
from sylva_ray.federation.stages.stage import Stage

DECAY = 0.9
"""Of the running mean of each expert's loss."""


class Lorica(AdversarialTraining):
    """Adapters of which only B is shared, with similar clients; four losses in training, gates choose layers after it.

    The less a loss has decreased since the round began, the larger its weight.
    """

    name = "lorica"
    papers = (
        "Qi et al. 2026, Lorica: A Synergistic Fine-Tuning Framework for Advancing Personalized Adversarial "
        "Robustness, arXiv 2506.05402v3",
    )

    class Parameters(OwnLoss, AdversarialTraining.Parameters):
        """Temperature and floor of the weights of the experts, prior of the logit-adjusted expert."""

        temperature: float = Field(1.0, gt=0)
        floor: float = Field(0.05, ge=0, le=0.25, description="smallest weight of an expert")
        prior: float = Field(0.1, ge=0, description="times log class counts, in the logit-adjusted expert")
        factors: Literal["both", "b", "a"] = "b"
        a_init: Literal["kaiming", "orthonormal"] = "orthonormal"
        adapters: Sharing = "neighbours"
        robust: RobustParameters = RobustParameters(rule="self_centred_clipping")
        phase2: Phase2Parameters = Phase2Parameters(selection="gates")

    parameters: Parameters

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return the stages of federated training, then the choice of layers by gates and their refinement."""
        return [*super().stages(config), *game_and_refinement(self.parameters.phase2)]

    def craft(self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """Craft images by PGD on the cross-entropy."""
        return craft_ce(context, params, batch, attack)

    def robust_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum over experts e of g_e l_e for every image, ``[N]``.

        The experts are CE(x'), CE(x), KL(p(x) || p(x')), and CE(x') with logits adjusted by class counts. The weights g
        are detached; otherwise the model could lower its loss by changing the weights.
        """
        clean = context.model.forward(params, batch.x, batch.owner)
        moved = context.model.forward(params, x_adv, batch.owner)
        log_counts = torch.log(context.class_counts.clamp(min=1).to(moved.dtype))
        adjusted = moved + self.parameters.prior * context.to_images(log_counts, batch)
        experts = torch.stack(
            [
                cross_entropy(moved, batch.y),
                cross_entropy(clean, batch.y),
                kl_divergence(clean, moved),
                cross_entropy(adjusted, batch.y),
            ],
            dim=1,
        )
        means = torch.stack([batch.mean_by_client(experts[:, e].detach()) for e in range(experts.shape[1])], dim=1)
        return (context.to_images(self.gates(context, means, batch.active), batch) * experts).sum(1)

    def gates(self, context: ClientContext, means: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Return ``[C, 4]`` weights that sum to 1, from the mean losses ``means [C, 4]`` of this step.

        g = (1 - 4 floor) softmax(m / temperature) + floor, where m is the running mean of each expert's loss divided by
        its first value. Clients that are not ``active`` keep their running means.
        """
        first, running = context.scratch.get("experts", (means.clamp(min=1e-3), means))
        running = torch.where(active[:, None], DECAY * running + (1 - DECAY) * means, running)
        context.scratch["experts"] = (first, running)
        p = self.parameters
        weights = torch.softmax(running / first / p.temperature, dim=1)
        return (1 - means.shape[1] * p.floor) * weights + p.floor

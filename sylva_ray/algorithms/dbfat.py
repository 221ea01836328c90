"""DBFAT (Zhang et al. 2023, "Delving into the Adversarial Robustness of Federated Learning"): images near the decision
boundary weigh more, and the local model is held to the global one's clean predictions. Read: the abstract; the weights'
formula is ours.
"""

from __future__ import annotations

import torch
from pydantic import Field

from sylva_ray.algorithms.adversarial import OwnLoss, detached
from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.attacks.losses import cross_entropy, kl_divergence
from sylva_ray.attacks.pgd import pgd
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.federation.context import Batch, ClientContext


class DBFAT(FedAvgAT):
    """rho CE(z(x'), y) + beta KL(p_G(x) || p(x')), rho by how few PGD steps an image needs to fall."""

    name = "dbfat"

    class Parameters(OwnLoss, FedAvgAT.Parameters):
        """beta 1.5."""

        beta: float = Field(1.5, ge=0)

    parameters: Parameters

    def craft(self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """PGD on the cross-entropy, which notes the first step at which each image is misclassified.

        The reference answers here, too: crafting runs in evaluation mode, a training step would move its statistics."""
        frozen = detached(params)
        first_fall = torch.full_like(batch.y, attack.steps)
        steps_taken = 0

        def objective(x: torch.Tensor) -> torch.Tensor:
            nonlocal steps_taken
            logits = context.model.forward(frozen, x, batch.owner)
            falls_now = (logits.argmax(1) != batch.y) & (first_fall == attack.steps)
            first_fall[falls_now] = steps_taken
            steps_taken += 1
            return cross_entropy(logits, batch.y)

        with context.stopwatch("attack"):
            x_adv = pgd(objective, batch.x, attack, batch.noise)
        with torch.no_grad():
            context.scratch["reference"] = context.model.forward(context.received, batch.x, batch.owner)
        context.scratch["closeness"] = torch.exp(-first_fall.to(batch.x.dtype) / attack.steps)
        return x_adv

    def robust_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """rho_i = exp(-d_i / k), divided by its mean over the client's batch; d_i = k for an image that stands."""
        closeness = context.scratch["closeness"]
        rho = closeness / context.to_images(batch.mean_by_client(closeness), batch)
        logits = context.model.forward(params, x_adv, batch.owner)
        held = kl_divergence(context.scratch["reference"], logits)
        return rho * cross_entropy(logits, batch.y) + self.parameters.beta * held

"""DBFAT: decision-boundary-based federated adversarial training (Zhang et al. 2023).

"Delving into the Adversarial Robustness of Federated Learning". Images near the decision boundary have larger weights,
and the local model is regularised towards the clean predictions of the global one. We know the abstract; the formula of
the weights is our choice.
"""

from __future__ import annotations

from pydantic import Field

from sylva_ray.algorithms.adversarial import OwnLoss, detached
from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.attacks.losses import cross_entropy, kl_divergence
from sylva_ray.attacks.pgd import pgd
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.federation.context import Batch, ClientContext


class DBFAT(FedAvgAT):
    """FedAvg-AT where images near the decision boundary weigh more and the global model regularises the local one.

    The loss is rho CE(z(x'), y) + beta KL(p_G(x) || p(x')); rho is larger if PGD needs fewer steps to fool the model.
    """

    name = "dbfat"
    papers = ("Zhang et al. 2023, Delving into the Adversarial Robustness of Federated Learning, AAAI",)

    class Parameters(OwnLoss, FedAvgAT.Parameters):
        """Beta 1.5."""

        beta: float = Field(1.5, ge=0)

    parameters: Parameters

    def craft(self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """Craft images by PGD on the cross-entropy, and record the first step at which each is misclassified.

        The global model predicts here as well, because crafting runs in evaluation mode; a training step would change
        its batch statistics.
        """
        first_fooled = torch.full_like(batch.y, attack.steps)

        def craft(own: ParameterStack, part: Batch, rows: slice) -> torch.Tensor:
            fooled_at = torch.full_like(part.y, attack.steps)
            steps_taken = 0

            def objective(x: torch.Tensor) -> torch.Tensor:
                nonlocal steps_taken
                logits = context.model.forward(own, x, part.owner)
                newly_fooled = (logits.argmax(1) != part.y) & (fooled_at == attack.steps)
                fooled_at[newly_fooled] = steps_taken
                steps_taken += 1
                return cross_entropy(logits, part.y)

            crafted = pgd(objective, part.x, attack, part.noise)
            first_fooled[rows] = fooled_at
            return crafted

        with context.stopwatch("attack"):
            x_adv = context.in_windows(detached(params), batch, craft)
        with torch.no_grad():
            context.scratch["reference"] = context.model.forward(context.received, batch.x, batch.owner)
        context.scratch["closeness"] = torch.exp(-first_fooled.to(batch.x.dtype) / attack.steps)
        return x_adv

    def robust_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of every image, ``[N]``.

        rho_i = exp(-d_i / k), divided by its mean over the client's batch, where d_i is the first of k steps at which
        image i is misclassified (k if it never is).
        """
        closeness = context.scratch["closeness"]
        rho = closeness / context.to_images(batch.mean_by_client(closeness), batch)
        logits = context.model.forward(params, x_adv, batch.owner)
        distance = kl_divergence(context.scratch["reference"], logits)
        losses: torch.Tensor = rho * cross_entropy(logits, batch.y) + self.parameters.beta * distance
        return losses

"""CalFAT: logits calibrated by class counts (Chen et al. 2022).

"Calibrated Federated Adversarial Training with Label Skewness". The cross-entropy of a client lowers the logits of
classes that the client has few images of. Adding the log of the class counts to the logits during training avoids that.
Constants and the attack follow the authors' code.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sylva_ray.algorithms.adversarial import OwnLoss, craft_kl
from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.federation.context import Batch, ClientContext


class CalFAT(FedAvgAT):
    """FedAvg-AT with logits calibrated by class counts, so that a client's rare classes keep their logits.

    The loss is CE(scale (z(x') + prior log n), y), where x' maximises the KL of the calibrated, unscaled predictions.
    """

    name = "calfat"
    papers = ("Chen et al. 2022, CalFAT: Calibrated Federated Adversarial Training with Label Skewness, NeurIPS",)

    class Parameters(OwnLoss, FedAvgAT.Parameters):
        """Scale 10 and prior 0.1, so that the loss is CE(10 z + log n); clients have equal weights."""

        scale: float = Field(10.0, gt=0)
        prior: float = Field(0.1, ge=0)
        weighting: Literal["samples", "uniform"] = "uniform"

    parameters: Parameters

    def craft(self, context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        """Craft images by PGD on KL(softmax(z(x) + offset) || softmax(z(x') + offset))."""
        return craft_kl(context, params, batch, attack, self._offset(context, batch))

    def robust_losses(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor
    ) -> torch.Tensor:
        """Return the calibrated cross-entropy of every image, ``[N]``."""
        logits = context.model.forward(params, x_adv, batch.owner)
        return cross_entropy(self.parameters.scale * (logits + self._offset(context, batch)), batch.y)

    def _offset(self, context: ClientContext, batch: Batch) -> torch.Tensor:
        """Return ``prior log n`` of every image's client, ``[N, num_classes]``; n is at least 1."""
        log_counts = torch.log(context.class_counts.clamp(min=1).to(batch.x.dtype) + 1e-7)
        return self.parameters.prior * context.to_images(log_counts, batch)

"""FedProx-AT: adversarial training held close to the broadcast model (FedProx, Li et al. 2020, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.context import Batch, ClientContext


class FedProxAT(FedAvgAT):
    """The loss plus (mu / 2) ||theta - theta_t||^2 over what trains; theta_t is what the client received this round."""

    name = "fedprox_at"

    class Parameters(FedAvgAT.Parameters):
        """mu 0.01; 0 is FedAvg-AT, bit for bit."""

        mu: float = Field(0.01, ge=0)

    parameters: Parameters

    def gradients(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The proximal term's gradient is mu (theta - theta_t)."""
        gradients, losses_C = super().gradients(context, params, batch, x_adv, names)
        if self.parameters.mu == 0:
            return gradients, losses_C
        pull = {name: self.parameters.mu * (params[name] - context.received[name]) for name in names}
        return {name: gradients[name] + pull[name] for name in names}, losses_C

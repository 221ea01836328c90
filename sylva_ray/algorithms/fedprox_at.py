"""FedProx-AT: adversarial training with a proximal term towards the broadcast model (Li et al. 2020, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.context import Batch, ClientContext


class FedProxAT(FedAvgAT):
    """FedAvg-AT with a proximal term, which keeps a client's model close to the one that it received.

    The term is (mu / 2) ||theta - theta_t||^2 over the trained parameters; theta_t is what the client received.
    """

    name = "fedprox_at"
    papers = ("Li et al. 2020, Federated Optimization in Heterogeneous Networks, MLSys",)

    class Parameters(FedAvgAT.Parameters):
        """Mu 0.01; 0 is FedAvg-AT, bit for bit."""

        mu: float = Field(0.01, ge=0)

    parameters: Parameters

    def gradients(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Add the gradient of the proximal term, mu (theta - theta_t)."""
        gradients, losses_C = super().gradients(context, params, batch, x_adv, names)
        if self.parameters.mu == 0:
            return gradients, losses_C
        proximal = {name: self.parameters.mu * (params[name] - context.received[name]) for name in names}
        return {name: gradients[name] + proximal[name] for name in names}, losses_C

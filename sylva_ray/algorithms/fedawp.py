"""Adversarial weight perturbation in a federation (AWP, Wu et al. 2020): the gradient is taken where the weights hurt most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.models.cohort import broadcast_clients


class FedAWP(FedAvgAT):
    """Every weight matrix moves by v = gamma ||w|| g / ||g|| up the loss; the step is taken at w from the gradient at w + v.

    g is the gradient on the same adversarial images (the authors' proxy takes one ascent step of SGD, which has its direction).
    A LoRA factor that is still 0 borrows its partner's norm, a hundredth of it (our choice)."""

    name = "fedawp"

    class Parameters(FedAvgAT.Parameters):
        """gamma 0.01, the paper's for adversarial training (0.005 with TRADES)."""

        gamma: float = Field(0.01, ge=0)

    parameters: Parameters

    def gradients(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """At the perturbed weights; the parameters themselves are never touched, so there is nothing to restore."""
        proxy = {name: value if name in names else value.clone() for name, value in params.items()}
        ascent, _ = super().gradients(context, proxy, batch, x_adv, names)  # running statistics move at w + v alone
        shifted = dict(params)
        for name in names:
            if params[name].ndim > 2:  # a client's matrix, with the leading client axis
                norms_C = ascent[name].flatten(1).norm(dim=1).clamp(min=1e-20)
                size_C = self.parameters.gamma * _size(name, params) / norms_C
                shifted[name] = params[name] + broadcast_clients(size_C, params[name]) * ascent[name]
        return super().gradients(context, shifted, batch, x_adv, names)


def _size(name: str, params: ParameterStack) -> torch.Tensor:
    """``[C]`` norms of every client's matrix; of a zero LoRA factor a hundredth of its partner's."""
    own = params[name].flatten(1).norm(dim=1)
    partner = name.replace(".lora_B", ".lora_A") if name.endswith(".lora_B") else name
    return torch.maximum(own, 0.01 * params[partner].flatten(1).norm(dim=1))

"""FedAWP: federated adversarial training with adversarial weight perturbation (AWP, Wu et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.models.cohort import broadcast_clients


class FedAWP(FedAvgAT):
    """FedAvg-AT whose gradients are taken at weights that were moved a little towards a higher loss.

    A step at w uses the gradient at w + v, v = gamma ||w|| g / ||g||, for every matrix w whose name ends in ``weight``,
    as in the authors' code, and for the factors of adapters. g is the gradient on the same adversarial images; the
    authors' proxy takes one ascent step of SGD, which has its direction. For a LoRA factor that is 0, ||w|| is a
    hundredth of the norm of the other factor (our choice).
    """

    name = "fedawp"
    papers = ("Wu et al. 2020, Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS",)

    class Parameters(FedAvgAT.Parameters):
        """Gamma 0.01, as in the paper for adversarial training (0.005 with TRADES)."""

        gamma: float = Field(0.01, ge=0)

    parameters: Parameters

    def gradients(
        self, context: ClientContext, params: ParameterStack, batch: Batch, x_adv: torch.Tensor, names: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the gradients at the perturbed weights; ``params`` are not changed."""
        proxy = {name: value if name in names else value.clone() for name, value in params.items()}
        ascent, _ = super().gradients(context, proxy, batch, x_adv, names)  # batch statistics change at w + v only
        shifted = dict(params)
        for name in names:
            if name.endswith(("weight", ".lora_A", ".lora_B")) and params[name].ndim > 2:  # with the client axis
                norms_C = ascent[name].flatten(1).norm(dim=1).clamp(min=1e-20)
                size_C = self.parameters.gamma * _size(name, params) / norms_C
                shifted[name] = params[name] + broadcast_clients(size_C, params[name]) * ascent[name]
        return super().gradients(context, shifted, batch, x_adv, names)


def _size(name: str, params: ParameterStack) -> torch.Tensor:
    """Return the norm of every client's matrix, ``[C]``; at least a hundredth of that of the other LoRA factor."""
    norms = params[name].flatten(1).norm(dim=1)
    partner = name.replace(".lora_B", ".lora_A") if name.endswith(".lora_B") else name
    return torch.maximum(norms, 0.01 * params[partner].flatten(1).norm(dim=1))

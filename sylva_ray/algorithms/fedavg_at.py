"""Federated adversarial training with one model for all: FedAvg-AT, also called FedPGD (Zizzo et al. 2020).

FedAvg (McMahan et al. 2017) of locally adversarially trained models. ``fedtrades`` and ``fedmart`` change the loss,
``fedavg_at_ft`` adds the local fine-tuning that every personalised method has to beat. All train the whole model;
``algorithm.model=lora`` trains adapters, whose products are averaged exactly (``fedit_at`` averages the factors apart, as
FedIT does; Zhang et al. 2024).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.federation.parameters import Sharing


class FedAvgAT(AdversarialTraining):
    """One global model, adversarially trained; what is deployed is that model."""

    name = "fedavg_at"

    class Parameters(AdversarialTraining.Parameters):
        """Everything trains and everything is shared."""

        model: Literal["lora", "full"] = "full"
        heads: Sharing = "global"
        final_local_epochs: int = Field(0, ge=0)


class FedAvgATFineTuned(FedAvgAT):
    """FedAvg-AT, then adversarial epochs on every client's own images."""

    name = "fedavg_at_ft"

    class Parameters(FedAvgAT.Parameters):
        """The last epochs make it personal."""

        final_local_epochs: int = Field(1, ge=0)


class FedTrades(FedAvgAT):
    """FedTRADES: the trade-off between accuracy and smoothness (Zhang et al. 2019)."""

    name = "fedtrades"

    class Parameters(FedAvgAT.Parameters):
        """beta 6, the paper's."""

        loss: Literal["ce_adv", "trades", "mart"] = "trades"


class FedMart(FedAvgAT):
    """FedMART: misclassified images weigh more (Wang et al. 2020)."""

    name = "fedmart"

    class Parameters(FedAvgAT.Parameters):
        """beta 5, the paper's."""

        loss: Literal["ce_adv", "trades", "mart"] = "mart"
        beta: float = Field(5.0, ge=0)


class FedItAT(FedAvgAT):
    """FedIT's aggregation (Zhang et al. 2024): A and B averaged apart, which is not the average of the models."""

    name = "fedit_at"

    class Parameters(FedAvgAT.Parameters):
        """LoRA with naive factors."""

        model: Literal["lora", "full"] = "lora"
        factor_rule: Literal["product_svd", "naive"] = "naive"

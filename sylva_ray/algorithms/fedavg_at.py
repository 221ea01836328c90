"""Federated adversarial training with one model for all: FedAvg-AT, also called FedPGD (Zizzo et al. 2020).

FedAvg (McMahan et al. 2017) of locally adversarially trained models. ``fedtrades`` and ``fedmart`` change the loss,
``fedavg_at_ft`` adds local fine-tuning, the baseline of personalised methods. All train the whole model. With
``algorithm.model=lora`` they train adapters, whose products are averaged exactly; ``fedit_at`` averages the factors
separately, as FedIT does (Zhang et al. 2024).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.federation.parameters import Sharing


class FedAvgAT(AdversarialTraining):
    """One global model, adversarially trained and deployed as it is."""

    name = "fedavg_at"

    class Parameters(AdversarialTraining.Parameters):
        """All parameters are trained and shared."""

        model: Literal["lora", "full"] = "full"
        heads: Sharing = "global"
        final_local_epochs: int = Field(0, ge=0)


class FedAvgATFineTuned(FedAvgAT):
    """FedAvg-AT, then adversarial epochs on the images of each client."""

    name = "fedavg_at_ft"

    class Parameters(FedAvgAT.Parameters):
        """One local epoch at the end."""

        final_local_epochs: int = Field(1, ge=0)


class FedTrades(FedAvgAT):
    """FedTRADES: FedAvg-AT with the TRADES loss (Zhang et al. 2019)."""

    name = "fedtrades"

    class Parameters(FedAvgAT.Parameters):
        """Beta 6, as in the paper."""

        loss: Literal["ce_adv", "trades", "mart"] = "trades"


class FedMart(FedAvgAT):
    """FedMART: FedAvg-AT with the MART loss, where misclassified images have larger weights (Wang et al. 2020)."""

    name = "fedmart"

    class Parameters(FedAvgAT.Parameters):
        """Beta 5, as in the paper."""

        loss: Literal["ce_adv", "trades", "mart"] = "mart"
        beta: float = Field(5.0, ge=0)


class FedItAT(FedAvgAT):
    """FedIT's aggregation (Zhang et al. 2024): separate averages of A and B, not the average of the models."""

    name = "fedit_at"

    class Parameters(FedAvgAT.Parameters):
        """LoRA, whose factors are averaged naively."""

        model: Literal["lora", "full"] = "lora"
        factor_rule: Literal["product_svd", "naive"] = "naive"

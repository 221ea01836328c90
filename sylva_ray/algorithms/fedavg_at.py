"""Federated adversarial training with one model for all: FedAvg-AT, also called FedPGD (Zizzo et al. 2020).

FedAvg (McMahan et al. 2017) of locally adversarially trained models. ``fedtrades`` and ``fedmart`` change the loss,
``fedavg_at_ft`` adds local fine-tuning, the baseline of personalised methods. All train the whole model. With
``algorithm.model=lora`` they train adapters, whose products are averaged exactly; ``fedit_at`` averages the factors
separately, as FedIT does (Zhang et al. 2024).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.algorithms.undefended import FEDAVG
from sylva_ray.federation.parameters import Sharing


class FedAvgAT(AdversarialTraining):
    """One model for all clients: every client trains it adversarially, and the results are averaged."""

    name = "fedavg_at"
    papers: ClassVar[tuple[str, ...]] = (
        FEDAVG,
        "Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR",
        "Zizzo et al. 2020, FAT: Federated Adversarial Training, arXiv 2012.01791",
    )

    class Parameters(AdversarialTraining.Parameters):
        """All parameters are trained and shared."""

        model: Literal["lora", "full"] = "full"
        heads: Sharing = "global"
        final_local_epochs: int = Field(0, ge=0)


class FedAvgATFineTuned(FedAvgAT):
    """FedAvg-AT, then adversarial epochs of every client on its own images."""

    name = "fedavg_at_ft"
    papers = FedAvgAT.papers

    class Parameters(FedAvgAT.Parameters):
        """One local epoch at the end."""

        final_local_epochs: int = Field(1, ge=0)


class FedTrades(FedAvgAT):
    """FedAvg-AT with the TRADES loss, which keeps predictions under attack close to those on clean images."""

    name = "fedtrades"
    papers = ("Zhang et al. 2019, Theoretically Principled Trade-off between Robustness and Accuracy, ICML",)

    class Parameters(FedAvgAT.Parameters):
        """Beta 6, as in the paper."""

        loss: Literal["ce_adv", "trades", "mart"] = "trades"


class FedMart(FedAvgAT):
    """FedAvg-AT with the MART loss, where misclassified images have larger weights."""

    name = "fedmart"
    papers = ("Wang et al. 2020, Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR",)

    class Parameters(FedAvgAT.Parameters):
        """Beta 5, as in the paper."""

        loss: Literal["ce_adv", "trades", "mart"] = "mart"
        beta: float = Field(5.0, ge=0)


class FedItAT(FedAvgAT):
    """FedAvg-AT of adapters whose LoRA factors A and B are averaged separately, which is not the mean of the models."""

    name = "fedit_at"
    papers = ("Zhang et al. 2024, Towards Building the Federated GPT: Federated Instruction Tuning, ICASSP",)

    class Parameters(FedAvgAT.Parameters):
        """LoRA, whose factors are averaged naively."""

        model: Literal["lora", "full"] = "lora"
        factor_rule: Literal["product_svd", "naive"] = "naive"

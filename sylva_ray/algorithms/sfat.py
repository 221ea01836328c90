"""Slack federated adversarial training (SFAT, Zhu et al. 2023): the most robust clients have larger weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.core.sections import conflict
from sylva_ray.federation.context import RoundUploads


class SFAT(FedAvgAT):
    """FedAvg-AT in which the clients with the smallest adversarial loss have larger weights in the average.

    Their weights are (1 + slack) / (1 - slack) times as large.
    """

    name = "sfat"
    papers = ("Zhu et al. 2023, Combating Exacerbated Heterogeneity for Robust Models in Federated Learning, ICLR",)

    class Parameters(FedAvgAT.Parameters):
        """Slack 1/6, that is a factor of 1.4, for one favoured client."""

        slack: float = Field(1 / 6, ge=0, lt=1)
        favoured: int = Field(1, ge=0)

        @model_validator(mode="after")
        def _has_weights(self) -> Self:
            if self.robust.rule != "mean":
                fix = "weighs all clients alike, and the weights are what the method is: use only mean"
                raise conflict("algorithm.robust.rule", self.robust.rule, fix)
            return self

    parameters: Parameters

    def client_weights(self, uploads: RoundUploads, clients: Sequence[int]) -> np.ndarray:
        """Return the weights; in round 1 those of FedAvg, because losses then depend mainly on the images."""
        weights = super().client_weights(uploads, clients)
        if uploads.round > 1:
            losses = [uploads.metrics[client]["loss"] for client in clients]
            best = np.argsort(losses, kind="stable")[: self.parameters.favoured]
            weights[best] *= (1 + self.parameters.slack) / (1 - self.parameters.slack)
        return weights

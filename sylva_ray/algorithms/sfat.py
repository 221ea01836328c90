"""Slack federated adversarial training (SFAT, Zhu et al. 2023): the most robust clients have larger weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from sylva_ray.algorithms.fedavg_at import FedAvgAT
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

    parameters: Parameters

    def client_weights(self, uploads: RoundUploads, clients: Sequence[int]) -> np.ndarray:
        """Return the weights; in round 1 those of FedAvg, because losses then depend mainly on the images."""
        weights = super().client_weights(uploads, clients)
        if uploads.round > 1:
            losses = [uploads.metrics[client]["loss"] for client in clients]
            best = np.argsort(losses, kind="stable")[: self.parameters.favoured]
            weights[best] *= (1 + self.parameters.slack) / (1 - self.parameters.slack)
        return weights

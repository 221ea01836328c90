"""Federated clean fine-tuning: FedAvg of the exact LoRA products, with personal heads.

Its benign accuracy is good; under PGD-20 at 8/255 its accuracy is about 0.
"""

from __future__ import annotations

from sylva_ray.federation.contract import Algorithm

FEDAVG = "McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS"
"""The paper of FedAvg."""


class Undefended(Algorithm):
    """No defence: adapters shared by all clients and personal heads, trained on images without an attack."""

    name = "undefended"
    papers = (FEDAVG,)

"""Federated clean fine-tuning: FedAvg of the exact LoRA products, with personal heads.

On a backbone that was never attacked, its accuracy under PGD-20 at 8/255 is about 0 (benchmarks/README.md).
"""

from __future__ import annotations

from sylva_ray.federation.contract import Algorithm

FEDAVG = "McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS"
"""The paper of FedAvg."""


class Undefended(Algorithm):
    """No defence: adapters shared by all clients and personal heads, trained on images without an attack."""

    name = "undefended"
    papers = (FEDAVG,)

"""Federated clean fine-tuning: FedAvg of the exact LoRA products, with personal heads.

Its benign accuracy is good; under PGD-20 at 8/255 its accuracy is about 0.
"""

from __future__ import annotations

from sylva_ray.federation.contract import Algorithm


class Undefended(Algorithm):
    """The base method: benign cross-entropy, global adapters, local heads."""

    name = "undefended"

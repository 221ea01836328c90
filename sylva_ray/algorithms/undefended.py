"""The undefended fleet: federated clean fine-tuning (FedAvg of the exact LoRA products, personal heads).

What a fleet looks like before anybody thinks of attacks: good benign accuracy, and about 0 under PGD-20 at 8/255.
"""

from __future__ import annotations

from sylva_ray.federation.contract import Algorithm


class Undefended(Algorithm):
    """The base method as it is: benign cross-entropy, global adapters, local heads."""

    name = "undefended"

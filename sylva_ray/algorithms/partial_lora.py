"""Adversarially trained LoRA with one uploaded factor: FFA-LoRA (Sun et al. 2024) and FedSA-LoRA (Guo et al. 2025)."""

from __future__ import annotations

from typing import Literal

from sylva_ray.algorithms.adversarial import AdversarialTraining


class FfaLoraAT(AdversarialTraining):
    """Adversarially trained LoRA with a frozen A, the same for all clients; only B is trained and averaged.

    So the average of B is exactly that of the models.
    """

    name = "ffa_lora_at"
    papers = ("Sun et al. 2024, Improving LoRA in Privacy-preserving Federated Learning, ICLR",)

    class Parameters(AdversarialTraining.Parameters):
        """Only B is trained and uploaded: half the bytes of LoRA where layers are square."""

        factors: Literal["both", "b", "a"] = "b"


class FedSaLoraAT(AdversarialTraining):
    """Adversarially trained LoRA of which A is averaged over the clients, and B stays on its client.

    A holds the general directions, B what is specific to a client.
    """

    name = "fedsa_lora_at"
    papers = ("Guo et al. 2025, Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR",)

    class Parameters(AdversarialTraining.Parameters):
        """Both factors are trained, A is uploaded."""

        factors: Literal["both", "b", "a"] = "a"

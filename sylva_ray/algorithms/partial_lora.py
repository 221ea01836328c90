"""Adversarially trained LoRA with one uploaded factor: FFA-LoRA (Sun et al. 2024) and FedSA-LoRA (Guo et al. 2025)."""

from __future__ import annotations

from typing import Literal

from sylva_ray.algorithms.adversarial import AdversarialTraining


class FfaLoraAT(AdversarialTraining):
    """A is frozen and the same for all clients; B is averaged, so the mean of the models is exact."""

    name = "ffa_lora_at"

    class Parameters(AdversarialTraining.Parameters):
        """Only B is trained and uploaded: half the bytes of LoRA where layers are square."""

        factors: Literal["both", "b", "a"] = "b"


class FedSaLoraAT(AdversarialTraining):
    """A, the general directions, is averaged; B, which is specific to a client, is personal."""

    name = "fedsa_lora_at"

    class Parameters(AdversarialTraining.Parameters):
        """Both factors are trained, A is uploaded."""

        factors: Literal["both", "b", "a"] = "a"

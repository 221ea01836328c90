"""Adversarially trained LoRA of which one factor travels: FFA-LoRA-AT (Sun et al. 2024) and FedSA-LoRA-AT (Guo et al. 2025)."""

from __future__ import annotations

from typing import Literal

from sylva_ray.algorithms.adversarial import AdversarialTraining


class FfaLoraAT(AdversarialTraining):
    """A stays as it was drawn, the same for all; B is averaged, so the mean of the models is exact."""

    name = "ffa_lora_at"

    class Parameters(AdversarialTraining.Parameters):
        """Half the upload of LoRA where layers are square."""

        factors: Literal["both", "b", "a"] = "b"


class FedSaLoraAT(AdversarialTraining):
    """A, the general directions, is averaged; B, what a client makes of them, stays at home."""

    name = "fedsa_lora_at"

    class Parameters(AdversarialTraining.Parameters):
        """Both factors train, A travels."""

        factors: Literal["both", "b", "a"] = "a"

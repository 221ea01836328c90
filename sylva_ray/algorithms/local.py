"""Local adversarial training: every client trains on its own data and uploads nothing."""

from __future__ import annotations

from typing import Literal

from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.federation.parameters import Sharing


class PerLora(AdversarialTraining):
    """Per-LoRA: Sylva's phase 1 without the federation, with the same loss, warm-up and number of steps."""

    name = "per_lora"

    class Parameters(AdversarialTraining.Parameters):
        """Nothing is shared."""

        adapters: Sharing = "local"


class PerAdv(PerLora):
    """Per-Adv: local adversarial training of the whole model."""

    name = "per_adv"

    class Parameters(PerLora.Parameters):
        """All parameters are trained."""

        model: Literal["lora", "full"] = "full"

"""Local-only adversarial training: every client defends itself with its own data and uploads nothing (0 bytes)."""

from __future__ import annotations

from typing import Literal

from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.federation.parameters import Sharing


class PerLora(AdversarialTraining):
    """Per-LoRA: Sylva's phase 1 without the federation; same loss, same warm-up, same number of steps."""

    name = "per_lora"

    class Parameters(AdversarialTraining.Parameters):
        """Nothing is shared."""

        adapters: Sharing = "local"


class PerAdv(PerLora):
    """Per-Adv: the same with the whole model."""

    name = "per_adv"

    class Parameters(PerLora.Parameters):
        """Everything trains."""

        model: Literal["lora", "full"] = "full"

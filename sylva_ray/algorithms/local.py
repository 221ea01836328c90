"""Local adversarial training: every client trains on its own data and uploads nothing."""

from __future__ import annotations

from typing import Literal

from sylva_ray.algorithms.adversarial import AdversarialTraining
from sylva_ray.federation.parameters import Sharing


class PerLora(AdversarialTraining):
    """Every client trains adapters adversarially on its own images; nothing is shared.

    This is Sylva's phase 1 without the federation, with the same loss, warm-up and number of steps.
    """

    name = "per_lora"

    class Parameters(AdversarialTraining.Parameters):
        """Nothing is shared."""

        adapters: Sharing = "local"


class PerAdv(PerLora):
    """Every client trains its whole model adversarially on its own images; nothing is shared."""

    name = "per_adv"

    class Parameters(PerLora.Parameters):
        """All parameters are trained."""

        model: Literal["lora", "full"] = "full"

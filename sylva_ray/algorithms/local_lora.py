"""Local-only LoRA adversarial training: every client defends itself with its own data and uploads nothing (0 bytes)."""

from __future__ import annotations

from typing import Literal

from sylva_ray.algorithms.base import Phase2Parameters
from sylva_ray.algorithms.sylva import Sylva


class LocalLora(Sylva):
    """Sylva's phase 1 without the federation: same loss, same warm-up, same number of steps."""

    name = "local_lora"

    class Parameters(Sylva.Parameters):
        """Nothing is shared, and there is no phase 2."""

        adapters: Literal["neighbours", "global", "local"] = "local"
        phase2: Phase2Parameters = Phase2Parameters(enabled=False)

"""A method with a third phase: after Sylva's refinement, every client hardens its model for one more adversarial epoch.

    sylva-ray run configs/digits.yaml --import . algorithm.name=examples.third_phase:HardenedSylva

A stage is a class with a name for records, a title for people, and a phase. It uses the fleet and the workers through
the `Server`. The loop, checkpoints, records, the evaluation at the end of a phase, reports and resuming need no further
code.
"""

from __future__ import annotations

from pydantic import Field

from sylva_ray.algorithms.sylva import Sylva
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.federation.client.training import TrainSettings
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.federated_round import last_lr
from sylva_ray.federation.stages.stage import Stage, StageResult


class Harden(Stage):
    """One local adversarial epoch at ``factor`` times the training epsilon; nothing is sent."""

    name = "harden"
    title = "phase 3: hardening"
    phase = 3

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def run(self, server: Server, step: int) -> StageResult:
        """See `Stage.run`."""
        epsilon, lr = self.factor * server.config.attack.epsilon, last_lr(server.config)
        outcomes, _ = server.train(step, server.everyone, TrainSettings(epsilon, lr, epochs=1))
        return StageResult(epsilon, lr, metrics=server.adopt_states(outcomes))


class HardenedSylva(Sylva):
    """Sylva with a third phase."""

    name = "hardened_sylva"

    class Parameters(Sylva.Parameters):
        """``harden_factor`` multiplies the training epsilon in phase 3."""

        harden_factor: float = Field(1.25, gt=0)

    parameters: Parameters

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return Sylva's stages and `Harden`."""
        return [*super().stages(config), Harden(self.parameters.harden_factor)]

"""The last local epochs, from the merged state; without a phase 2 the result is deployed."""

from __future__ import annotations

from sylva_ray.federation.client.training import TrainSettings
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.federated_round import last_lr
from sylva_ray.federation.stages.stage import Stage, StageResult


class LocalEpochs(Stage):
    """Local training at the full epsilon and the last learning rate. Nothing is uploaded."""

    name = "personalise"
    title = "phase 1: local epoch"

    def run(self, server: Server, round: int) -> StageResult:
        """See `Stage.run`."""
        epsilon, lr = server.config.attack.epsilon, last_lr(server.config)
        epochs = server.parameters.final_local_epochs
        outcomes, _ = server.train(round, server.everyone, TrainSettings(epsilon, lr, epochs))
        return StageResult(epsilon, lr, metrics=server.adopt_states(outcomes))


def local_epochs(epochs: int) -> list[Stage]:
    """Return the stage, or no stage without epochs."""
    return [LocalEpochs()] if epochs else []

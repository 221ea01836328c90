"""The warm-up: every client fits its head on benign data, because an untrained model cannot be attacked."""

from __future__ import annotations

from sylva_ray.federation.client.training import TrainSettings
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.stage import Stage, StageResult


class WarmUp(Stage):
    """Trains the heads alone, benignly. Shared heads are then merged, so that round 1 starts from one model."""

    name = "warmup"
    title = "warm-up"
    phase = 0
    evaluated = "in full"

    def run(self, server: Server, step: int) -> StageResult:
        """See `Stage.run`."""
        epochs, lr = server.parameters.head_warmup_epochs, server.parameters.head_warmup_lr
        if epochs == 0:
            return StageResult()
        received = server.states.copy()
        settings = TrainSettings(epsilon=0.0, lr=lr, epochs=0, head_epochs=epochs)
        outcomes, _ = server.train(step, server.everyone, settings)
        metrics = server.adopt_states(outcomes)
        server.exchange(step, outcomes, received, server.algorithm.warm_up_names())
        return StageResult(lr=lr, metrics=metrics)

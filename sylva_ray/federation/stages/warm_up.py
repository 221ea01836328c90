"""The warm-up: every client fits its head on benign data, so that attacks have something to attack."""

from __future__ import annotations

from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.stage import Stage, StageResult


class WarmUp(Stage):
    """Benign epochs of the head alone. Heads that are shared are merged at once: one model for all starts round 1 as one."""

    name = "warmup"
    title = "warm-up"
    phase = 0
    evaluated = "in full"

    def run(self, server: Server, round: int) -> StageResult:
        """See `Stage.run`."""
        epochs, lr = server.parameters.head_warmup_epochs, server.parameters.head_warmup_lr
        if epochs == 0:
            return StageResult()
        received = server.states.copy()
        outcomes, _ = server.train(round, server.everyone, epsilon=0.0, lr=lr, epochs=0, head_epochs=epochs)
        metrics = server.adopt_states(outcomes)
        server.exchange(round, outcomes, received, server.algorithm.warm_up_names())
        return StageResult(epsilon=0.0, lr=lr, metrics=metrics)

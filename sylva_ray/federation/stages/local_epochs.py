"""The last local epochs, from the merged state; without a phase 2 the result is deployed."""

from __future__ import annotations

from sylva_ray.federation.client.training import TrainOutcome, TrainSettings
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.federated_round import attacked_at, last_lr
from sylva_ray.federation.stages.stage import Stage, StageResult


class LocalEpochs(Stage):
    """Local training at the full epsilon and the last learning rate.

    Nothing is uploaded, but where a phase 2 follows rounds with a part of the clients: its neighbourhoods need the
    adapters of everybody, and one model for all says nothing about those who were not in the last round.

    Args:
        epochs: at least 1.
    """

    name = "personalise"
    title = "phase 1: local epoch"

    def __init__(self, epochs: int) -> None:
        assert epochs >= 1, f"{epochs} local epochs"
        self.epochs = epochs

    def run(self, server: Server, step: int) -> StageResult:
        """See `Stage.run`."""
        result, _ = self.train(server, step)
        return result

    def train(self, server: Server, step: int) -> tuple[StageResult, dict[int, TrainOutcome]]:
        """Train all clients, and let them keep what they trained.

        Returns:
            The result of the stage, and ``{client: outcome}`` of those whose training did not diverge.
        """
        epsilon, lr = server.config.attack.epsilon, last_lr(server.config)
        received = server.states.copy()
        outcomes, _ = server.train(step, server.everyone, TrainSettings(epsilon, lr, self.epochs))
        metrics = server.adopt_states(outcomes)
        graph = None
        if server.place.records_neighbours and server.hears_a_part and server.parameters.adapters == "global":
            with server.exchanging():
                uploads, _ = server.collect(step, outcomes, received)
            graph = server.neighbourhood(received, uploads.by_client)
        return StageResult(attacked_at(epsilon, server), lr, metrics=metrics, neighbours=graph), outcomes

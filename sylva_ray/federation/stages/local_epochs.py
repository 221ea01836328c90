"""The last local epochs, from the merged state; without a phase 2 the result is deployed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from sylva_ray.core.types import ClientState
from sylva_ray.federation.client.training import TrainOutcome, TrainSettings
from sylva_ray.federation.context import RoundUploads
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.federated_round import attacked_at, last_lr
from sylva_ray.federation.stages.stage import Stage, StageResult

Collected: TypeAlias = tuple[RoundUploads, Collection[int]]
"""The result of `Server.collect`."""


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
        received = server.states.copy()
        result, outcomes = self.train(server, step)
        heard = self.uploads_of_all(server, step, outcomes, received)
        return result if heard is None else with_neighbours(result, server, received, heard)

    def train(self, server: Server, step: int) -> tuple[StageResult, dict[int, TrainOutcome]]:
        """Train all clients, and let them keep what they trained.

        Returns:
            The result of the stage, and ``{client: outcome}`` of those whose training did not diverge.
        """
        epsilon, lr = server.config.attack.epsilon, last_lr(server.config)
        outcomes, _ = server.train(step, server.everyone, TrainSettings(epsilon, lr, self.epochs))
        return StageResult(attacked_at(epsilon, server), lr, metrics=server.adopt_states(outcomes)), outcomes

    def uploads_of_all(
        self, server: Server, step: int, outcomes: Mapping[int, TrainOutcome], received: Sequence[ClientState]
    ) -> Collected | None:
        """Collect what all clients have trained where phase 2 needs it for its neighbourhoods; None where it does not.

        Args:
            server: of the run.
            step: position of the stage.
            outcomes: what the clients trained.
            received: the states that they started from.
        """
        if not (server.place.records_neighbours and server.hears_a_part and server.parameters.adapters == "global"):
            return None
        with server.exchanging():
            return server.collect(step, outcomes, received)


def with_neighbours(
    result: StageResult, server: Server, received: Sequence[ClientState], collected: Collected
) -> StageResult:
    """Return the result of a stage with the neighbourhoods that follow from uploads of all clients."""
    uploads, _ = collected
    return replace(result, neighbours=server.neighbourhood(received, uploads.by_client))

"""Benign refinement of the selected layers; every client keeps the last epoch that passes the guard."""

from __future__ import annotations

import numpy as np

from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.layer_game.server import largest_accepted
from sylva_ray.federation.stages.layer_game.tasks import RefineOutcome, RefineTask
from sylva_ray.federation.stages.stage import Stage, StageResult


class Refine(Stage):
    """Refines the layers that a `LayerGame` selected.

    Args:
        phase2: the parameters of phase 2.
    """

    name = "phase2"
    title = "phase 2: refinement"
    phase = 2
    needs_neighbours = True

    def __init__(self, phase2: Phase2Parameters) -> None:
        self.phase2 = phase2

    def run(self, server: Server, step: int) -> StageResult:
        """See `Stage.run`."""
        assert server.game is not None, "the layer game comes before the refinement"
        selected = np.array(server.game.selected, bool)
        refining = [client for client in server.everyone if selected[client].any()]
        if not refining:
            return StageResult(participants=[])
        refined: dict[int, RefineOutcome] = server.run(
            [RefineTask(step, c, server.stack(c), self.phase2, selected[list(c)]) for c in server.cohorts(refining)]
        )
        guard = {client: outcome.guard for client, outcome in refined.items()}
        graph = server.recorded_neighbourhood()
        refined_epochs = list(server.game.refined_epochs)
        for client in refining:
            verdict = largest_accepted(client, guard, lambda other, _: other in guard, graph, self.phase2)
            refined_epochs[client] = verdict.row
            if verdict.row:
                server.states[client] = dict(refined[client].states[verdict.row - 1])
        server.game = server.game.model_copy(update={"refined_epochs": refined_epochs})
        server.costs.upload_bytes += sum(3 * outcome.lost.nbytes for outcome in guard.values())
        return StageResult(participants=refining)

"""Benign refinement of the selected layers; every client keeps as much as the guard accepts."""

from __future__ import annotations

import numpy as np

from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.layer_game.server import NOTHING_KEPT, Evidence, accepted_strength, columns
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
        outcomes = {client: outcome.guard for client, outcome in refined.items()}
        guard = Evidence(outcomes, server.recorded_neighbourhood(), self.phase2)
        verdicts = [NOTHING_KEPT] * len(server.everyone)
        for client in refining:
            verdict = verdicts[client] = accepted_strength(client, guard)
            if verdict.row:
                server.states[client] = dict(refined[client].states[verdict.row - 1])
        server.game = server.game.model_copy(update=columns(verdicts, self.phase2.strengths))
        server.costs.upload_bytes += sum(outcome.num_bytes for outcome in outcomes.values())
        server.costs.download_bytes += np.dtype(float).itemsize * len(refining)  # the accepted strength
        return StageResult(lr=self.phase2.refine_lr, participants=refining)

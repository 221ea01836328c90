"""The loop of a run over its stages.

Every stage produces new client states and one record. The loop waits only for the pool, until all results are there or
the deadline of a round has passed. It depends neither on a tracker nor on Ray: records go to an `Observer`, tasks to a
`ClientPool`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sylva_ray.core.records import Neighbours, StageRecord
from sylva_ray.federation.evaluator import Evaluator
from sylva_ray.federation.observer import StageStarted
from sylva_ray.federation.server import Server, StageCosts
from sylva_ray.federation.stages.stage import Stage
from sylva_ray.federation.summary import compute_of


class Rounds:
    """Runs the stages that follow the newest checkpoint.

    Args:
        server: with the states that the clients start from.
        stages: of the run, in order.
    """

    def __init__(self, server: Server, stages: Sequence[Stage]) -> None:
        self.server, self.stages = server, stages
        self.evaluator = Evaluator(server, stages)

    def run(self) -> None:
        """Load the newest checkpoint, if there is one; then run, evaluate, save and report every stage that is left."""
        server, checkpoint = self.server, self.server.folder.checkpoints.latest()
        if checkpoint is not None:
            server.states, server.records, server.game = checkpoint.states, checkpoint.records, checkpoint.game
            server.wire.residuals = checkpoint.residuals
            server.observer.on_resume(server.records)
        for index in range(len(server.records), len(self.stages)):
            server.observer.on_stage(StageStarted(index, len(self.stages), self.stages[index].title))
            server.observer.on_record(self.run_stage(index))

    def run_stage(self, index: int) -> StageRecord:
        """Run the stage at position ``index``: update the states, write a checkpoint and return the record."""
        started = time.perf_counter()
        server, stage = self.server, self.stages[index]
        server.costs = costs = StageCosts()
        result = stage.run(server, index)
        evaluation = self.evaluator.evaluate(index)
        costs.seconds["wall"] = time.perf_counter() - started
        graph = result.neighbours
        record = StageRecord(
            step=index,
            stage=stage.name,
            round=index,
            epsilon=result.epsilon,
            lr=result.lr,
            participants=server.everyone if result.participants is None else list(result.participants),
            missing=list(result.missing),
            metrics={name: dict(by_client) for name, by_client in result.metrics.items()},
            neighbours=graph and Neighbours(members=graph.members.tolist(), weights=graph.weights.tolist()),
            evaluation=evaluation,
            upload_bytes=costs.upload_bytes,
            download_bytes=costs.download_bytes,
            upload_payload_bytes=costs.upload_payload_bytes,
            download_payload_bytes=costs.download_payload_bytes,
            seconds=costs.seconds,
            peak_memory_bytes=costs.peak_memory_bytes,
            dropped=costs.dropped,
            refused={str(client): reason for client, reason in costs.refused.items()} or None,
            compute=compute_of(server.config),
        )
        server.records.append(record)
        server.folder.checkpoints.save(index, server.states, server.records, server.game, server.wire.residuals)
        return record

"""The numbered loop: a run is a list of stages.

Per stage it produces new client states and one record; it waits for the pool; it is unblocked by results or by a round's
deadline. It knows no tracker and no Ray: records go to a callback, tasks to a `ClientPool`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.types import ClientState
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.evaluator import Evaluator
from sylva_ray.federation.pool import ClientPool
from sylva_ray.federation.server import OnEvent, Server, StageCosts
from sylva_ray.federation.stages.stage import StageResult
from sylva_ray.federation.summary import compute
from sylva_ray.storage.checkpoint import CheckpointFolder

Record = dict[str, Any]


class Rounds:
    """Runs an algorithm's stages from wherever the newest checkpoint left off.

    Args:
        config, algorithm, fleet, initial_states, players, pool, run_dir, on_event: see `Server`; ``run_dir`` also holds
            ``checkpoint/``.
        on_record: called with all records so far after every stage's checkpoint.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        algorithm: Algorithm,
        fleet: FleetData,
        initial_states: Sequence[ClientState],
        players: dict[str, tuple[str, ...]],
        pool: ClientPool,
        run_dir: Path,
        on_record: Callable[[list[Record]], None],
        on_event: OnEvent,
    ) -> None:
        self.server = Server(config, algorithm, fleet, initial_states, players, pool, run_dir, on_event)
        self.stages = algorithm.stages(config)
        self.evaluator = Evaluator(self.server, self.stages)
        self.checkpoints = CheckpointFolder(run_dir / "checkpoint")
        self.on_record, self.on_event = on_record, on_event

    def run(self) -> None:
        """1 resume, 2 then for every stage left: run it, evaluate if due, checkpoint, report."""
        server, checkpoint = self.server, self.checkpoints.latest()
        if checkpoint is not None:
            server.states, server.records, server.game = checkpoint.states, checkpoint.records, checkpoint.game
            server.wire.residuals = checkpoint.residuals
            self.on_record(server.records)
        for index in range(len(server.records), len(self.stages)):
            name = self.stages[index].name
            self.on_event({"event": "step", "step": index, "steps": len(self.stages), "stage": name})
            self.on_event({"event": "record", "record": self.run_stage(index)})

    def run_stage(self, index: int) -> Record:
        """One stage: new states, a record, a checkpoint."""
        started = time.perf_counter()
        server, stage = self.server, self.stages[index]
        server.costs = StageCosts()
        result = stage.run(server, index)
        evaluation = self.evaluator.evaluate(index)
        record: Record = {"step": index, "stage": stage.name, "round": index, **self._of_result(result)}
        record |= {"evaluation": evaluation, **server.costs.record(), "compute": compute(server.config)}
        record["seconds"]["wall"] = time.perf_counter() - started
        server.records.append(record)
        self.checkpoints.save(index, server.states, server.records, server.game, server.wire.residuals)
        self.on_record(server.records)
        return record

    def _of_result(self, result: StageResult) -> Record:
        """A stage's result in its JSON form."""
        everyone = self.server.everyone
        record: Record = {
            "epsilon": result.epsilon,
            "lr": result.lr,
            "participants": everyone if result.participants is None else list(result.participants),
            "missing": list(result.missing),
            "metrics": result.metrics,
        }
        if result.neighbours is not None:
            members, weights = result.neighbours.members.tolist(), result.neighbours.weights.tolist()
            record["neighbours"] = {"members": members, "weights": weights}
        return record

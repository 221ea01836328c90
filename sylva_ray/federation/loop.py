"""The loop of a run over its stages.

Every stage produces new client states and one record. The loop waits only for the pool, until all results are there or
the deadline of a round has passed. It depends neither on a tracker nor on Ray: records go to an `Observer`, tasks to a
`ClientPool`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from sylva_ray.core.errors import UserError
from sylva_ray.core.records import Neighbours, StageRecord
from sylva_ray.core.text import clients_text
from sylva_ray.federation.evaluator import Evaluator
from sylva_ray.federation.observer import Notice, StageStarted
from sylva_ray.federation.server import Place, Server, StageCosts
from sylva_ray.federation.stages.federated_round import FederatedRound
from sylva_ray.federation.stages.stage import Stage
from sylva_ray.federation.summary import compute_of
from sylva_ray.storage.checkpoint import Checkpoint
from sylva_ray.storage.checkpoint_writer import CheckpointWriter
from sylva_ray.transport.byzantine import byzantine_clients


class Rounds:
    """Runs the stages that follow the newest checkpoint.

    Args:
        server: with the states that the clients start from.
        stages: of the run, in order.
    """

    def __init__(self, server: Server, stages: Sequence[Stage]) -> None:
        self.server, self.stages = server, stages
        self.evaluator = Evaluator(server, stages)
        self.writer = CheckpointWriter(server.folder)

    def run(self) -> int:
        """Load the newest checkpoint, if there is one; then run, evaluate, save and report every stage that is left.

        Returns:
            The number of stages that were run.

        Raises:
            UserError: the checkpoint is not one of this run.
        """
        server, checkpoint = self.server, self.server.folder.load_checkpoint(self.server.config)
        if checkpoint is not None:
            self._check_fits(checkpoint)
            for reason in checkpoint.damaged:
                server.observer.on_notice(Notice(f"checkpoint {reason}; the run continues from an older one"))
            server.states, server.records, server.game = checkpoint.states, checkpoint.records, checkpoint.game
            self.writer.stored = checkpoint.stored
            server.wire.residuals = checkpoint.residuals
        server.observer.on_resume(server.records)
        num_done = len(server.records)
        with self.writer:
            for index in range(num_done, len(self.stages)):
                server.observer.on_stage(StageStarted(index, len(self.stages), self.stages[index].heading))
                server.observer.on_record(self.run_stage(index))
        return len(self.stages) - num_done

    def _check_fits(self, checkpoint: Checkpoint) -> None:
        """Check that a checkpoint has the stages of this run, and states of the form that its clients start from."""
        done, planned = [record.stage for record in checkpoint.records], [stage.name for stage in self.stages]
        if len(done) != checkpoint.step + 1 or done != planned[: len(done)]:
            fix = f"its {len(done)} records are not of the first {checkpoint.step + 1} stages of this run"
            raise UserError("checkpoint", str(self.server.folder), fix)
        for client, (state, initial) in enumerate(zip(checkpoint.states, self.server.states, strict=True)):
            found, expected = ({n: (v.shape, str(v.dtype)) for n, v in s.items()} for s in (state, initial))
            wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            if wrong:
                now, then = (_form(arrays.get(wrong[0])) for arrays in (expected, found))
                fix = f"the array {wrong[0][:80]!r} of client {client} is {then} there, and {now} in this run"
                raise UserError("checkpoint", str(self.server.folder), fix)

    def run_stage(self, index: int) -> StageRecord:
        """Run the stage at position ``index``: update the states, write a checkpoint and return the record."""
        started = time.perf_counter()
        server, stage = self.server, self.stages[index]
        server.place, server.costs = place_of(self.stages, index), StageCosts()
        server.keep_windows()
        result = stage.run(server, index)
        begun = self.writer.begin(index, server.states)
        evaluation = self.evaluator.evaluate(index)
        costs = server.costs
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
            metrics=self._finite_metrics(index, stage, result.metrics),
            neighbours=graph and Neighbours(members=graph.members.tolist(), weights=graph.weights.tolist()),
            evaluation=evaluation,
            panel=self.evaluator.panel(index),
            in_part=self.evaluator.has_less(index) or None,
            byzantine=byzantine_clients(server.config) or None,
            upload_bytes=costs.upload_bytes,
            download_bytes=costs.download_bytes,
            upload_payload_bytes=costs.upload_payload_bytes,
            download_payload_bytes=costs.download_payload_bytes,
            seconds=costs.seconds,
            peak_memory_bytes=costs.peak_memory_bytes,
            gpus=sorted(costs.gpus) or None,
            peak_gpu_memory_bytes=costs.peak_gpu_memory_bytes or None,
            reduced_windows=costs.reduced_windows or None,
            dropped=costs.dropped,
            refused={str(client): reason for client, reason in costs.refused.items()} or None,
            compute=compute_of(server.config),
            changed_inputs=server.changed_inputs or None,
            extended_from=server.folder.extensions.rounds_before(index, server.config.training.rounds),
        )
        server.records.append(record)
        server.states = self.writer.complete(
            *(begun, server.config, server.states, server.records, server.game, server.wire.residuals),
            self._last_round(),
        )
        return record

    def _finite_metrics(
        self, step: int, stage: Stage, metrics: Mapping[str, Mapping[str, float]]
    ) -> dict[str, dict[str, float]]:
        """Return the metrics of a stage that JSON can hold; a notice says what is left out."""
        kept = {name: {c: v for c, v in values.items() if math.isfinite(v)} for name, values in metrics.items()}
        for name, values in metrics.items():
            if lost := [int(client) for client in values if client not in kept[name]]:
                whose = clients_text(lost)
                text = f"step {step}: {name} of {whose} is not a finite number after {stage.name}, and not recorded"
                self.server.observer.on_notice(Notice(text))
        return kept

    def _last_round(self) -> list[int]:
        """Return the position of the last round so far. Its checkpoint stays: rounds that are added go on there."""
        done = self.stages[: len(self.server.records)]
        return [index for index, stage in enumerate(done) if isinstance(stage, FederatedRound)][-1:]


def _form(array: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if array is None else f"{array[1]} {list(array[0])}"


def place_of(stages: Sequence[Stage], index: int) -> Place:
    """Return the place of the stage at position ``index`` in a run of ``stages``."""
    num_rounds = sum(stage.exchanges for stage in stages[: index + 1])
    following = next((stage for stage in stages[index + 1 :] if stage.needs_neighbours or stage.exchanges), None)
    return Place(num_rounds, following is not None and following.needs_neighbours)

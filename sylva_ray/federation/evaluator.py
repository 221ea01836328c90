"""Evaluation of all clients after a stage: when it takes place, and which cohorts have not changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sylva_ray.core.records import ClientAccuracies
from sylva_ray.core.types import AttackSpec, stack_digest
from sylva_ray.federation.client.measuring import EvaluateOutcome, EvaluateTask
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.stage import Stage
from sylva_ray.metrics.accuracy import evaluate_client, fleet_table
from sylva_ray.metrics.checks import S4_IMAGES, UNBOUNDED
from sylva_ray.metrics.predictions import write_predictions


class Evaluator:
    """Evaluates the clients of a `Server` after a stage.

    Args:
        server: with the states of the clients.
        stages: of the run.
    """

    def __init__(self, server: Server, stages: Sequence[Stage]) -> None:
        self.server, self.stages = server, stages
        self._measured: dict[tuple[int, ...], tuple[tuple[Any, ...], dict[int, Mapping[str, np.ndarray]]]] = {}

    def evaluate(self, index: int) -> dict[str, ClientAccuracies] | None:
        """Return the accuracies after stage ``index``, or None if the stage is not evaluated.

        Evaluation is in full at the end of every phase and of the run, and where a stage asks for it; otherwise every
        ``evaluation.every`` stages with the first attack.
        """
        section, stage = self.server.config.evaluation, self.stages[index]
        following = self.stages[index + 1] if index + 1 < len(self.stages) else None
        is_last = following is None
        ends_phase = following is None or following.phase > max(stage.phase, 1)
        in_full = ends_phase or stage.evaluated == "in full"
        if stage.evaluated == "never" or not (in_full or (section.every and index % section.every == 0)):
            return None
        server = self.server
        attacks = section.specs if in_full else section.specs[:1]
        limit = None if in_full else section.max_samples
        answers = self._answers(index, attacks, limit)
        table = self._table(answers, limit)
        if is_last:
            write_predictions(server.folder, answers, [self._labels(client, limit) for client in server.everyone])
            if section.checks:
                unbounded = self._answers(index, (UNBOUNDED,), S4_IMAGES)
                table |= {UNBOUNDED.label: self._table(unbounded, S4_IMAGES)[UNBOUNDED.label]}
        return table

    def _answers(
        self, round: int, attacks: tuple[AttackSpec, ...], limit: int | None
    ) -> list[Mapping[str, np.ndarray]]:
        """Return the predictions of all clients, ``{condition: [n]}`` each.

        A cohort that has not changed since it was last evaluated in the same way is not attacked again, e.g. if phase 2
        refined nothing. Only whole cohorts are reused, so that results are bit-identical to those of a resumed run.
        """
        server = self.server
        tasks = [
            EvaluateTask(round, cohort, server.stack(cohort), attacks, limit)
            for cohort in server.cohorts(server.everyone)
        ]
        keys = {task.clients: (attacks, limit, stack_digest(task.states)) for task in tasks}
        unchanged = {cohort for cohort, key in keys.items() if self._measured.get(cohort, ((), {}))[0] == key}
        outcomes: dict[int, EvaluateOutcome] = server.run([task for task in tasks if task.clients not in unchanged])
        for cohort in keys.keys() - unchanged:
            self._measured[cohort] = keys[cohort], {client: outcomes[client].predictions for client in cohort}
        answers = {client: own for cohort in keys for client, own in self._measured[cohort][1].items()}
        return [answers[client] for client in server.everyone]

    def _table(self, answers: Sequence[Mapping[str, np.ndarray]], limit: int | None) -> dict[str, ClientAccuracies]:
        return fleet_table([evaluate_client(own, self._labels(c, limit)) for c, own in enumerate(answers)])

    def _labels(self, client: int, limit: int | None) -> np.ndarray:
        return self.server.fleet.test_labels(client)[:limit]

"""Evaluation of all clients after a stage: when it takes place, and which cohorts have not changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from sylva_ray.config.experiment import EvaluationSection
from sylva_ray.core.records import ClientAccuracies
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import AttackSpec, stack_digest, state_bytes
from sylva_ray.federation.client.measuring import EvaluateOutcome, EvaluateTask
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.stage import Stage
from sylva_ray.metrics.accuracy import evaluate_client, fleet_table
from sylva_ray.metrics.checks import S4_IMAGES, UNBOUNDED
from sylva_ray.metrics.predictions import write_predictions
from sylva_ray.transport.byzantine import byzantine_clients

WINDOW_BYTES = 2**29
"""Of states in the tasks of an evaluation that exist at once; a large fleet is evaluated in several windows."""


@dataclass(frozen=True)
class _Measurement:
    """The predictions of a cohort, and what they depend on.

    Attributes:
        key: attacks, images per client, and a digest of the states.
        predictions: ``{client: {condition: [n]}}``.
    """

    key: tuple[tuple[AttackSpec, ...], int | None, bytes]
    predictions: Mapping[int, Mapping[str, np.ndarray]]


def evaluation_scope(
    section: EvaluationSection, stages: Sequence[Stage], index: int
) -> Literal["in full", "in part"] | None:
    """Return what is evaluated after the stage at position ``index``: all attacks and images, some, or nothing."""
    stage = stages[index]
    following = stages[index + 1] if index + 1 < len(stages) else None
    if stage.evaluated == "never":
        return None
    if following is None or following.phase > max(stage.phase, 1):
        return "in full"
    if stage.evaluated == "in full" and section.initial:
        return "in full"
    return "in part" if section.every and index % section.every == 0 else None


class Evaluator:
    """Evaluates the clients of a `Server` after a stage.

    Args:
        server: with the states of the clients.
        stages: of the run.
    """

    def __init__(self, server: Server, stages: Sequence[Stage]) -> None:
        self.server, self.stages = server, stages
        self._measurements: dict[tuple[int, ...], _Measurement] = {}

    def evaluate(self, index: int) -> dict[str, ClientAccuracies] | None:
        """Measure the accuracies after the stage at position ``index``.

        A full evaluation uses all attacks and test images. It takes place at the end of every phase and of the run, and
        where a stage asks for it. Every ``evaluation.every`` stages there is a smaller one, with the first attack.

        Returns:
            ``{condition: accuracies}``, or None where no evaluation is due.
        """
        server, section, scope = self.server, self.server.config.evaluation, self.scope(index)
        if scope is None:
            return None
        attacks = section.specs if scope == "in full" else section.specs[:1]
        limit = None if scope == "in full" else section.max_samples
        clients = server.everyone if scope == "in full" else self._panel or server.everyone
        predictions = self._predictions(index, attacks, limit, clients)
        accuracies = self._accuracies(predictions, limit, clients)
        if index + 1 == len(self.stages):
            write_predictions(server.folder, predictions, [self._labels(client, limit) for client in server.everyone])
            if section.checks:
                unbounded = self._predictions(index, (UNBOUNDED,), S4_IMAGES, server.everyone)
                measured = self._accuracies(unbounded, S4_IMAGES, server.everyone)
                accuracies |= {UNBOUNDED.label: measured[UNBOUNDED.label]}
        return accuracies

    def panel(self, index: int) -> list[int] | None:
        """Return the clients that are evaluated after the stage at position ``index``; None: all, or none."""
        return self._panel if self.scope(index) == "in part" else None

    def scope(self, index: int) -> Literal["in full", "in part"] | None:
        """See `evaluation_scope`."""
        return evaluation_scope(self.server.config.evaluation, self.stages, index)

    @cached_property
    def _panel(self) -> list[int] | None:
        """The clients of an evaluation in part: honest ones, since others count in no mean."""
        config, everyone = self.server.config, self.server.everyone
        if config.evaluation.clients is None or config.evaluation.clients >= len(everyone):
            return None
        order = numpy_generator(config.seed, "panel").permutation(len(everyone)).tolist()
        left_out = byzantine_clients(config)
        return sorted([client for client in order if client not in left_out][: config.evaluation.clients])

    def has_less(self, index: int) -> bool:
        """Return whether the evaluation after a stage has fewer attacks, images or clients than one in full."""
        section = self.server.config.evaluation
        is_smaller = len(section.specs) > 1 or section.max_samples is not None or self._panel is not None
        return is_smaller and self.scope(index) == "in part"

    def _predictions(
        self, step: int, attacks: tuple[AttackSpec, ...], limit: int | None, clients: Sequence[int]
    ) -> list[Mapping[str, np.ndarray]]:
        """Return the predictions of ``clients``, ``{condition: [n]}`` each.

        A cohort that has not changed since it was last evaluated in the same way is not attacked again, e.g. if phase 2
        refined nothing. Only whole cohorts are reused, so that results are bit-identical to those of a resumed run.
        """
        server, last = self.server, self._measurements
        cohorts = server.cohorts(clients)
        size = max(1, WINDOW_BYTES // state_bytes(server.states[0]) // server.config.training.cohort_size)
        for window in (cohorts[first : first + size] for first in range(0, len(cohorts), size)):
            tasks = [EvaluateTask(step, cohort, server.stack(cohort), attacks, limit) for cohort in window]
            keys = {task.clients: (attacks, limit, stack_digest(task.states)) for task in tasks}
            changed = [
                task for task in tasks if task.clients not in last or last[task.clients].key != keys[task.clients]
            ]
            outcomes: dict[int, EvaluateOutcome] = server.run(changed)
            for task in changed:
                predictions = {client: outcomes[client].predictions for client in task.clients}
                last[task.clients] = _Measurement(keys[task.clients], predictions)
        by_client = {client: values for cohort in cohorts for client, values in last[cohort].predictions.items()}
        return [by_client[client] for client in clients]

    def _accuracies(
        self, predictions: Sequence[Mapping[str, np.ndarray]], limit: int | None, clients: Sequence[int]
    ) -> dict[str, ClientAccuracies]:
        by_client = zip(clients, predictions, strict=True)
        return fleet_table([evaluate_client(p, self._labels(client, limit)) for client, p in by_client])

    def _labels(self, client: int, limit: int | None) -> np.ndarray:
        return self.server.fleet.test_labels(client)[:limit]

"""The numbered loop: rounds of phase 1, the last local epoch, the layer game, phase 2.

Per step it produces new client states and one record; it waits for the pool; it is unblocked by results or by the round's
deadline. It knows no tracker and no Ray: records go to a callback, tasks to a `ClientPool`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import (
    AttackSpec,
    ClientState,
    CohortResult,
    CohortTask,
    EvaluateOutcome,
    EvaluateTask,
    GameOutcome,
    GameTask,
    GuardOutcome,
    GuardTask,
    RefineOutcome,
    RefineTask,
    TrainOutcome,
    TrainTask,
    stack_digest,
    stack_states,
)
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.cohorts import choose_participants, make_cohorts
from sylva_ray.federation.contract import Algorithm, Arrived
from sylva_ray.federation.pool import ClientPool
from sylva_ray.federation.stages.layer_game.server import (
    GamePlan,
    largest_accepted,
    rank_layers,
    select_layers,
)
from sylva_ray.federation.summary import compute
from sylva_ray.metrics.accuracy import evaluate_client, fleet_table
from sylva_ray.metrics.checks import S4_IMAGES, UNBOUNDED
from sylva_ray.metrics.predictions import write_predictions
from sylva_ray.storage.checkpoint import CheckpointFolder
from sylva_ray.transport.wire import Traffic, Wire

Record = dict[str, Any]
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Step:
    """One entry of the plan. ``round`` numbers the random draws and the rounds of phase 1 (from 1)."""

    index: int
    stage: str
    round: int


def plan(config: ExperimentConfig, algorithm: Algorithm) -> list[Step]:
    """All steps of a run: warm-up (round 0), phase 1, the deployed state's last local epochs, the layer game, phase 2."""
    rounds = config.training.rounds
    stages = ["warmup", *["phase1"] * rounds]
    if algorithm.parameters.final_local_epochs:
        stages.append("personalise")
    if algorithm.parameters.phase2.enabled:
        stages += ["layer_game", "phase2"]
    return [Step(index, stage, index) for index, stage in enumerate(stages)]


@dataclass
class Ledger:
    """What one step costs: filled while it runs, written into its record."""

    seconds: dict[str, float] = field(default_factory=dict)
    upload_bytes: int = 0
    download_bytes: int = 0
    upload_payload_bytes: int = 0
    download_payload_bytes: int = 0
    peak_memory_bytes: int = 0
    dropped: list[int] = field(default_factory=list)

    def book(self, result: CohortResult) -> None:
        """Add a worker's seconds by stage."""
        for stage, seconds in result.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, result.peak_memory_bytes)


class Rounds:
    """Runs the plan from wherever the newest checkpoint left off.

    Args:
        config: resolved.
        algorithm: with ``head_names`` set.
        fleet: for sizes and labels (the images are the workers' business).
        initial_states: what the K clients start from.
        players: the layer game's players, ``{name: parameter names}``; empty for full models.
        pool: where tasks run.
        run_dir: holds ``checkpoint/`` and ``missing.jsonl``.
        on_record: called with all records so far after every step's checkpoint.
        on_event: progress for the display.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        algorithm: Algorithm,
        fleet: FleetData,
        initial_states: Sequence[ClientState],
        players: dict[str, tuple[str, ...]],
        pool: ClientPool,
        run_dir: Path,
        on_record: Callable[[list[Record]], None],
        on_event: OnEvent,
    ) -> None:
        self.config, self.algorithm, self.fleet, self.players = config, algorithm, fleet, players
        self.pool, self.run_dir, self.on_record, self.on_event = pool, run_dir, on_record, on_event
        self.checkpoints = CheckpointFolder(run_dir / "checkpoint")
        self.everyone = list(range(fleet.num_clients))
        self.sizes = fleet.label_matrix().sum(1).tolist()
        self.states: list[dict[str, np.ndarray]] = [dict(sorted(state.items())) for state in initial_states]
        self.records: list[Record] = []
        self.game: dict[str, Any] | None = None
        self.ledger = Ledger()
        self.wire = Wire(config, algorithm)
        self._measured: dict[tuple[int, ...], tuple[tuple[Any, ...], dict[int, Mapping[str, np.ndarray]]]] = {}

    def run(self) -> None:
        """1 resume, 2 then for every step left: do it, evaluate if due, checkpoint, report."""
        steps = plan(self.config, self.algorithm)
        checkpoint = self.checkpoints.latest()
        if checkpoint is not None:
            self.states, self.records, self.game = checkpoint.states, checkpoint.records, checkpoint.game
            self.wire.residuals = checkpoint.residuals
            self.on_record(self.records)
        for step in steps[len(self.records) :]:
            self.on_event({"event": "step", "step": step.index, "steps": len(steps), "stage": step.stage})
            self.on_event({"event": "record", "record": self.run_step(step)})

    def run_step(self, step: Step) -> Record:
        """One step of the plan: new states, a record, a checkpoint."""
        started = time.perf_counter()
        self.ledger = Ledger()
        record = {"step": step.index, "stage": step.stage, "round": step.round, "epsilon": None, "lr": None}
        record |= {"participants": self.everyone, "missing": [], "metrics": {}}
        match step.stage:
            case "warmup":
                record |= self._warmup(step)
            case "phase1":
                record |= self._phase1_round(step)
            case "personalise":
                record |= self._personalise(step)
            case "layer_game":
                record |= self._layer_game(step)
            case "phase2":
                record |= self._phase2(step)
        record["evaluation"] = self._evaluate(step)
        record |= {
            "upload_bytes": self.ledger.upload_bytes,
            "download_bytes": self.ledger.download_bytes,
            "upload_payload_bytes": self.ledger.upload_payload_bytes,
            "download_payload_bytes": self.ledger.download_payload_bytes,
            "seconds": self.ledger.seconds | {"wall": time.perf_counter() - started},
            "peak_memory_bytes": self.ledger.peak_memory_bytes,
            "dropped": self.ledger.dropped,
            "compute": compute(self.config),
        }
        self.records.append(record)
        self.checkpoints.save(step.index, self.states, self.records, self.game, self.wire.residuals)
        self.on_record(self.records)
        return record

    # -- phase 1 -------------------------------------------------------------------------------------------------------

    def _warmup(self, step: Step) -> Record:
        """Round 0: every client fits its head on benign data, so that attacks have something to attack.

        Heads that are shared are merged at once: a method with one model for all starts round 1 with one."""
        epochs, lr = self.algorithm.parameters.head_warmup_epochs, self.algorithm.parameters.head_warmup_lr
        if epochs == 0:
            return {}
        received = self.states.copy()
        results, _ = self._train(step, self.everyone, epsilon=0.0, lr=lr, epochs=0, head_epochs=epochs)
        metrics = self._take_over(results)
        self._exchange(step, results, received, self.algorithm.warm_up_names())
        return {"epsilon": 0.0, "lr": lr, "metrics": metrics}

    def _phase1_round(self, step: Step) -> Record:
        """1 choose participants, 2 train locally, 3 exchange: upload, aggregate, download."""
        previous_missing = self.records[-1]["missing"] if self.records else []
        participants = choose_participants(self.config, step.round, previous_missing)
        epsilon, lr = self._epsilon(step.round), self._lr(step.round)
        epochs = self.config.training.local_epochs
        received = self.states.copy()
        results, missing = self._train(step, participants, epsilon, lr, epochs, deadline=True)
        metrics = self._take_over(results)
        uploads = self._exchange(step, results, received)
        record: Record = {"epsilon": epsilon, "lr": lr, "participants": participants, "missing": missing}
        if step.round == self.config.training.rounds and self.algorithm.parameters.phase2.enabled:
            graph = self._neighbourhood(received, uploads)
            record["neighbours"] = {"members": graph.members.tolist(), "weights": graph.weights.tolist()}
        return record | {"metrics": metrics}

    def _exchange(
        self,
        step: Step,
        outcomes: Mapping[int, TrainOutcome],
        received: Sequence[ClientState],
        names: Sequence[str] | None = None,
    ) -> Mapping[int, ClientState]:
        """1 uploads over the wire, 2 the attackers' lies, 3 aggregation, 4 the answers. ``names`` None: all that travels.

        Returns what the coordinator holds of the uploads."""
        started = time.perf_counter()
        self.wire.traffic = Traffic()
        uploads = {
            client: self.wire.up(client, received[client], outcome.state, names)
            for client, outcome in sorted(outcomes.items())
        }
        uploads = self.wire.forged(step.round, {c: upload for c, upload in uploads.items() if upload}, received)
        if not uploads:
            return uploads
        metrics = {client: outcome.metrics for client, outcome in outcomes.items()}
        arrived = Arrived(step.round, self.states, received, uploads, self.sizes, metrics, self.config.seed)
        merged = self.algorithm.aggregate(arrived)
        self.states = [
            self.wire.down(client, received[client], merged[client], names, counted=client in uploads)
            for client in self.everyone
        ]
        self.ledger.seconds["aggregate"] = time.perf_counter() - started
        self.ledger.upload_bytes += self.wire.traffic.upload
        self.ledger.upload_payload_bytes += self.wire.traffic.upload_payload
        self.ledger.download_bytes += self.wire.traffic.download
        self.ledger.download_payload_bytes += self.wire.traffic.download_payload
        return uploads

    def _personalise(self, step: Step) -> Record:
        """The last local epochs on the merged state: these weights are the deployed ones."""
        epochs = self.algorithm.parameters.final_local_epochs
        epsilon, lr = self.config.attack.epsilon, self._lr(self.config.training.rounds)
        results, _ = self._train(step, self.everyone, epsilon, lr, epochs)
        return {"epsilon": epsilon, "lr": lr, "metrics": self._take_over(results)}

    def _train(
        self,
        step: Step,
        clients: Sequence[int],
        epsilon: float,
        lr: float,
        epochs: int,
        head_epochs: int = 0,
        deadline: bool = False,
    ) -> tuple[dict[int, TrainOutcome], list[int]]:
        """Train ``clients`` in cohorts; returns what arrived, and who is missing (only with ``deadline``).

        A client whose training diverged keeps its last state, uploads nothing, and is named in the record."""
        replayed = self._replayed_missing(step) if deadline else None
        tasks = [
            TrainTask(step.round, cohort, self._stack(cohort), epsilon, lr, epochs, head_epochs)
            for cohort in self._cohorts([client for client in clients if client not in (replayed or [])])
        ]
        limit = self.config.cluster.round_deadline_s if deadline and replayed is None else None
        outcomes: dict[int, TrainOutcome] = self._run(tasks, limit)
        missing = [client for client in clients if client not in outcomes]
        self.ledger.dropped = sorted(c for c, outcome in outcomes.items() if not _is_finite(outcome.state))
        outcomes = {c: outcome for c, outcome in outcomes.items() if c not in self.ledger.dropped}
        if limit is not None:
            self._note_missing(step, missing)
        return outcomes, missing

    def _take_over(self, outcomes: Mapping[int, TrainOutcome]) -> dict[str, dict[str, float]]:
        """New states from the outcomes; returns ``{metric: {client: value}}``."""
        metrics: dict[str, dict[str, float]] = {}
        for client, outcome in sorted(outcomes.items()):
            self.states[client] = dict(outcome.state)
            for name, value in outcome.metrics.items():
                metrics.setdefault(name, {})[str(client)] = value
        return metrics

    def _epsilon(self, round: int) -> float:
        """Ramped linearly from 0 over the first share of the rounds: a guard against collapse."""
        ramp = math.ceil(self.algorithm.parameters.epsilon_warmup * self.config.training.rounds)
        return self.config.attack.epsilon * min(1.0, round / (ramp + 1))

    def _lr(self, round: int) -> float:
        """Cosine over the rounds, from ``lr`` down to a tenth of it."""
        training = self.config.training
        if training.lr_schedule == "constant" or training.rounds == 1:
            return training.lr
        progress = (round - 1) / (training.rounds - 1)
        return training.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

    # -- deadlines depend on the wall clock, so who was missing is logged, and a re-run of the round replays the log ------

    def _replayed_missing(self, step: Step) -> list[int] | None:
        path = self.run_dir / "missing.jsonl"
        if self.config.cluster.round_deadline_s is None or not path.exists():
            return None
        logged = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return next((entry["missing"] for entry in logged if entry["round"] == step.round), None)

    def _note_missing(self, step: Step, missing: list[int]) -> None:
        with open(self.run_dir / "missing.jsonl", "a") as file:
            file.write(json.dumps({"round": step.round, "missing": missing}) + "\n")
        if missing:
            self.on_event({"event": "missing", "round": step.round, "clients": missing})

    # -- phase 2 -------------------------------------------------------------------------------------------------------

    def _layer_game(self, step: Step) -> Record:
        """1 play, 2 rank the layers, 3 candidates, 4 guard, 5 selection."""
        phase2 = self.algorithm.parameters.phase2
        rng = numpy_generator(self.config.seed, "game", round=step.round)
        game_plan = GamePlan.of(len(self.players), phase2, rng)
        cohorts = self._cohorts(self.everyone)
        played: dict[int, GameOutcome] = self._run(
            [
                GameTask(step.round, cohort, self._stack(cohort), game_plan.coalitions, phase2.selection)
                for cohort in cohorts
            ]
        )
        values = [played[client] for client in self.everyone]
        graph = self._known_neighbourhood()
        ranking = rank_layers(game_plan, values, graph, phase2, rng)
        candidates = ranking.candidates
        guarded: dict[int, GuardOutcome] = self._run(
            [
                GuardTask(
                    step.round,
                    cohort,
                    self._stack(cohort),
                    stack_states([values[client].benign_state for client in cohort]),
                    candidates[list(cohort)],
                )
                for cohort in cohorts
            ]
        )
        guard = [guarded[client] for client in self.everyone]
        selected, verdicts = select_layers(candidates, guard, graph, phase2)
        self.game = {
            "players": list(self.players),
            "selection": phase2.selection,
            **ranking.record(),
            "selected": selected.tolist(),
            "candidates": [len(np.unique(rows, axis=0)) for rows in candidates],
            "guard_bound": [verdict.bound for verdict in verdicts],
            "guard_images": [verdict.pooled_images for verdict in verdicts],
            "coalitions_evaluated": sum(len(outcome.values) for outcome in values),
            "block_evaluations": sum(outcome.block_evaluations for outcome in values),
            "exact": game_plan.permutations is None,
            "refined_epochs": [0] * len(self.everyone),
        }
        told = [outcome.values if outcome.scores is None else outcome.scores for outcome in values]
        self.ledger.upload_bytes += sum(t.nbytes for t in told) + sum(3 * o.lost.nbytes for o in guard)
        self.ledger.download_bytes += candidates.nbytes + selected.nbytes
        return {}

    def _phase2(self, step: Step) -> Record:
        """Benign refinement of the selected layers; every client keeps its last epoch that passes the guard."""
        assert self.game is not None, "the layer game comes before phase 2"
        phase2 = self.algorithm.parameters.phase2
        selected = np.array(self.game["selected"], bool)
        refining = [client for client in self.everyone if selected[client].any()]
        if not refining:
            return {"participants": []}
        refined: dict[int, RefineOutcome] = self._run(
            [RefineTask(step.round, c, self._stack(c), selected[list(c)]) for c in self._cohorts(refining)]
        )
        guard = {client: outcome.guard for client, outcome in refined.items()}
        graph = self._known_neighbourhood()
        for client in refining:
            verdict = largest_accepted(client, guard, lambda other, _: other in guard, graph, phase2)
            self.game["refined_epochs"][client] = verdict.row
            if verdict.row:
                self.states[client] = dict(refined[client].states[verdict.row - 1])
        self.ledger.upload_bytes += sum(3 * outcome.lost.nbytes for outcome in guard.values())
        return {"participants": refining}

    def _neighbourhood(self, received: Sequence[ClientState], uploads: Mapping[int, ClientState]) -> NeighbourGraph:
        """Whose values and guard outcomes speak for whom: by the last uploads, the newest that the coordinator knows."""
        known = [{**received[client], **uploads.get(client, {})} for client in self.everyone]
        adapters = [{n: v for n, v in state.items() if n not in self.algorithm.head_names} for state in known]
        return self.algorithm.phase2_graph(adapters, self.sizes)

    def _known_neighbourhood(self) -> NeighbourGraph:
        """The one noted at the end of phase 1: nothing but game values and outcomes travels in phase 2."""
        noted = next(record["neighbours"] for record in reversed(self.records) if "neighbours" in record)
        return NeighbourGraph(np.array(noted["members"]), np.array(noted["weights"]))

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate(self, step: Step) -> dict[str, dict[str, list[float]]] | None:
        """At the end of the warm-up, of phase 1 and of the run in full; in between every ``evaluation.every`` rounds."""
        section = self.config.evaluation
        steps = plan(self.config, self.algorithm)
        following = steps[step.index + 1].stage if step.index + 1 < len(steps) else "end"
        is_last = following == "end"
        in_full = is_last or following == "layer_game" or step.stage == "warmup"
        if step.stage == "layer_game" or not (in_full or (section.every and step.round % section.every == 0)):
            return None
        attacks = section.specs if in_full else section.specs[:1]
        limit = None if in_full else section.max_samples
        answers = self._answers(step, attacks, limit)
        table = self._table(answers, limit)
        if is_last:
            write_predictions(self.run_dir, answers, [self._labels(client, limit) for client in self.everyone])
            if section.checks:
                unbounded = self._answers(step, (UNBOUNDED,), S4_IMAGES)
                table |= {UNBOUNDED.label: self._table(unbounded, S4_IMAGES)[UNBOUNDED.label]}
        return table

    def _answers(
        self, step: Step, attacks: tuple[AttackSpec, ...], limit: int | None
    ) -> list[Mapping[str, np.ndarray]]:
        """All clients' predictions, ``{condition: [n]}`` each.

        A cohort of which nobody has changed since it was last measured so is not attacked again: where phase 2 refined
        nothing, its end is phase 1's. Whole cohorts only, so that the bits are those of a resumed run."""
        tasks = [
            EvaluateTask(step.round, cohort, self._stack(cohort), attacks, limit)
            for cohort in self._cohorts(self.everyone)
        ]
        keys = {task.clients: (attacks, limit, stack_digest(task.states)) for task in tasks}
        known = {cohort for cohort, key in keys.items() if self._measured.get(cohort, ((), {}))[0] == key}
        found: dict[int, EvaluateOutcome] = self._run([task for task in tasks if task.clients not in known])
        for cohort in keys.keys() - known:
            self._measured[cohort] = keys[cohort], {client: found[client].predictions for client in cohort}
        answers = {client: own for cohort in keys for client, own in self._measured[cohort][1].items()}
        return [answers[client] for client in self.everyone]

    def _table(
        self, answers: Sequence[Mapping[str, np.ndarray]], limit: int | None
    ) -> dict[str, dict[str, list[float]]]:
        return fleet_table([evaluate_client(own, self._labels(c, limit)) for c, own in enumerate(answers)])

    def _labels(self, client: int, limit: int | None) -> np.ndarray:
        return self.fleet.test_labels(client)[:limit]

    # -- what they share -----------------------------------------------------------------------------------------------

    def _cohorts(self, clients: Sequence[int]) -> list[tuple[int, ...]]:
        size = self.config.training.cohort_size
        assert isinstance(size, int), "cohort_size is resolved before the run"
        return make_cohorts(clients, self.sizes, size) if clients else []

    def _stack(self, cohort: Sequence[int]) -> dict[str, np.ndarray]:
        return stack_states([self.states[client] for client in cohort])

    def _run(self, tasks: Sequence[CohortTask], deadline_s: float | None = None) -> dict[int, Any]:
        """Run tasks on the pool, book what they cost; returns ``{client: outcome}`` of those that arrived."""
        outcomes: dict[int, Any] = {}
        for result in self.pool.run(tasks, deadline_s, self._task_done):
            if result is not None:
                self.ledger.book(result)
                outcomes |= zip(result.clients, result.outcomes, strict=True)
        return outcomes

    def _task_done(self, task: CohortTask, result: CohortResult) -> None:
        del result
        self.on_event({"event": "task", "stage": task.stage, "clients": list(task.clients)})


def _is_finite(state: ClientState) -> bool:
    return all(bool(np.isfinite(value).all()) for value in state.values())

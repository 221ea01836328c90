"""What a stage works with: the states of the clients, and what the coordinator does with them in every stage.

It depends neither on a tracker nor on Ray: tasks go to a `ClientPool`, progress to an `Observer`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.records import GameRecord, StageRecord
from sylva_ray.core.text import clients_text
from sylva_ray.core.types import ClientState, stack_states
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.client.training import TrainOutcome, TrainSettings, TrainTask
from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.cohorts import make_cohorts
from sylva_ray.federation.context import Merge, RoundUploads
from sylva_ray.federation.merging import MIN_MEMBERS, MergeTask, merge_on_pool
from sylva_ray.federation.method import Method
from sylva_ray.federation.observer import Notice, Observer, TaskDone
from sylva_ray.federation.pool import ClientPool
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.transport.validation import validate_uploads
from sylva_ray.transport.wire import Traffic, Wire


@dataclass
class StageCosts:
    """What a stage costs; it is filled while the stage runs and written into its record.

    Attributes:
        seconds: ``{activity: seconds}``, summed over workers.
        upload_bytes: bytes of the arrays from the clients.
        download_bytes: bytes of the arrays to the clients.
        upload_payload_bytes: bytes of the files that contain those arrays.
        download_payload_bytes: bytes of the files that contain those arrays.
        peak_memory_bytes: the highest resident memory of a worker.
        peak_gpu_memory_bytes: the most that the tensors of a worker used of its GPU.
        reduced_windows: those that were smaller than planned, because the memory was.
        gpus: of the workers, with driver and CUDA.
        dropped: clients whose training diverged.
        refused: ``{client: reason}`` of the uploads that were not merged.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    upload_bytes: int = 0
    download_bytes: int = 0
    upload_payload_bytes: int = 0
    download_payload_bytes: int = 0
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int = 0
    reduced_windows: dict[str, int] = field(default_factory=dict)
    gpus: set[str] = field(default_factory=set)
    dropped: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)

    def add(self, result: CohortResult[Any]) -> None:
        """Add the seconds and the memory of a task."""
        for activity, seconds in result.seconds.items():
            self.add_seconds(activity, seconds)
        self.peak_memory_bytes = max(self.peak_memory_bytes, result.peak_memory_bytes)
        self.peak_gpu_memory_bytes = max(self.peak_gpu_memory_bytes, result.peak_gpu_memory_bytes)
        self.gpus |= {result.gpu} if result.gpu else set()

    def add_seconds(self, activity: str, seconds: float) -> None:
        """Add the seconds of an activity."""
        self.seconds[activity] = self.seconds.get(activity, 0.0) + seconds


@dataclass(frozen=True)
class Place:
    """The place of the present stage in its run, which depends on the stages before and after it.

    Attributes:
        num_rounds: rounds so far in which clients exchanged what they share, with the present one.
        records_neighbours: whether a later stage needs the neighbourhoods that follow from the uploads of this one.
    """

    num_rounds: int = 0
    records_neighbours: bool = False


class Server:
    """The coordinator's half of a run.

    Args:
        config: the experiment.
        algorithm: the method, bound to its model.
        fleet: for the numbers of images and the labels.
        initial_states: the states that the K clients start from.
        players: of the layer game, ``{name: parameter names}``; empty for full models.
        pool: where tasks run.
        folder: of the run.
        observer: is told of finished tasks and missed deadlines.

    Attributes:
        states: of the K clients; a stage changes them.
        game: the result of the layer game, or None.
        records: of the stages before the present one.
        place: of the present stage.
        costs: of the present stage.
        changed_inputs: data and weights that are not those that the run began with, in words.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        algorithm: Method,
        fleet: FleetData,
        initial_states: Sequence[ClientState],
        players: dict[str, tuple[str, ...]],
        pool: ClientPool,
        folder: RunFolder,
        observer: Observer,
    ) -> None:
        self.config, self.algorithm, self.fleet, self.players = config, algorithm, fleet, players
        self.parameters = algorithm.parameters
        self.pool, self.folder, self.observer = pool, folder, observer
        self.everyone = list(range(fleet.num_clients))
        self.sizes: list[int] = fleet.label_matrix().sum(1).tolist()
        self.states: list[dict[str, np.ndarray]] = [dict(sorted(state.items())) for state in initial_states]
        self.records: list[StageRecord] = []
        self.game: GameRecord | None = None
        self.place, self.costs = Place(), StageCosts()
        self.changed_inputs: list[str] = []
        self.wire = Wire(algorithm, algorithm.postprocessors(config))

    @property
    def previous_missing(self) -> list[int]:
        """Participants of the previous stage that missed its deadline."""
        return self.records[-1].missing if self.records else []

    @property
    def invited_again(self) -> list[int]:
        """Those of them that did not miss the deadline before that: one too slow for it must not keep a place."""
        earlier = self.records[-2].missing if len(self.records) > 1 else []
        return [client for client in self.previous_missing if client not in earlier]

    # -- training and exchange --------------------------------------------------------------------------------------

    def train(
        self, step: int, clients: Sequence[int], settings: TrainSettings, deadline_s: float | None = None
    ) -> tuple[dict[int, TrainOutcome], list[int]]:
        """Train clients in cohorts.

        A client whose training diverged trained for nothing: it uploads nothing, and is named in the record. Which
        clients miss a deadline depends on the wall clock, so they are logged, and a repetition of the stage uses the
        log. With a deadline, cohorts with clients in `invited_again` begin first.

        Args:
            step: position of the stage.
            clients: the participants.
            settings: how they train.
            deadline_s: wall seconds after which clients count as missing; None: no deadline.

        Returns:
            ``{client: outcome}`` of the clients that finished, and the missing ones.
        """
        replayed = None if deadline_s is None else self.folder.load_missing(step)
        cohorts = [cohort for cohort in self.cohorts(clients) if not {*cohort} <= {*(replayed or [])}]
        if deadline_s is not None:
            cohorts.sort(key=lambda cohort: {*cohort}.isdisjoint(self.invited_again))
        tasks = [TrainTask(step, cohort, self.stack(cohort), settings) for cohort in cohorts]
        remaining_s = deadline_s if replayed is None else None
        outcomes: dict[int, TrainOutcome] = self.run(tasks, remaining_s)
        for client in replayed or ():  # in a cohort with others, if an older version chose the participants
            outcomes.pop(client, None)
        missing = [client for client in clients if client not in outcomes]
        diverged = {client for client, outcome in outcomes.items() if not _is_finite(outcome)}
        self.costs.dropped = sorted({*self.costs.dropped, *diverged})
        outcomes = {client: outcome for client, outcome in outcomes.items() if client not in diverged}
        if remaining_s is not None:
            self._note_missing(step, missing)
        return outcomes, missing

    def adopt_states(self, outcomes: Mapping[int, TrainOutcome]) -> dict[str, dict[str, float]]:
        """Replace the states of the clients that trained; return their metrics, ``{metric: {client: value}}``."""
        metrics: dict[str, dict[str, float]] = {}
        for client, outcome in sorted(outcomes.items()):
            self.states[client] = dict(outcome.state)
            for name, value in outcome.metrics.items():
                metrics.setdefault(name, {})[str(client)] = value
        return metrics

    def exchange(
        self,
        step: int,
        outcomes: Mapping[int, TrainOutcome],
        received: Sequence[ClientState],
        names: Sequence[str] | None = None,
    ) -> Mapping[int, ClientState]:
        """Exchange trained states for merged ones: 1 uploads, 2 validation, 3 aggregation, 4 downloads.

        Args:
            step: position of the stage.
            outcomes: what the participants trained, ``{client: outcome}``.
            received: the states that all K clients started from.
            names: the parameters that may travel; None: all that the method uploads.

        Returns:
            ``{client: state}``, the uploads that were merged, as the coordinator decodes them.
        """
        with self.exchanging():
            uploads, sent = self.collect(step, outcomes, received, names)
            if sent:
                merged = self.algorithm.aggregate(uploads)
                answered = dict.fromkeys(uploads.by_client, names)
                if self.wire.postprocessors or len(sent) > len(answered):
                    others = (client for client in self.everyone if client not in answered)
                    answered |= {client: _changed(merged[client], self.states[client], names) for client in others}
                self.states = [
                    self.wire.download(
                        step, client, received[client], merged[client], answered.get(client, names), client in sent
                    )
                    for client in self.everyone
                ]
        return uploads.by_client

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Add the seconds and the bytes of an exchange to the costs of the stage."""
        started, self.wire.traffic = time.perf_counter(), Traffic()
        yield
        self.costs.add_seconds("aggregate", time.perf_counter() - started)
        self.costs.upload_bytes += self.wire.traffic.upload
        self.costs.upload_payload_bytes += self.wire.traffic.upload_payload
        self.costs.download_bytes += self.wire.traffic.download
        self.costs.download_payload_bytes += self.wire.traffic.download_payload

    def collect(
        self,
        step: int,
        outcomes: Mapping[int, TrainOutcome],
        received: Sequence[ClientState],
        names: Sequence[str] | None = None,
    ) -> tuple[RoundUploads, Collection[int]]:
        """Upload and validate states, the first half of `exchange`.

        Returns:
            The valid uploads, and the clients that have uploaded anything.
        """
        trained = {client: outcome.state for client, outcome in outcomes.items()}
        sent = self.wire.upload(step, received, trained, names)
        valid = self._validated(step, sent, received, names) if sent else {}
        uploads = RoundUploads(
            self.place.num_rounds,
            self.states,
            received,
            valid,
            self.sizes,
            {client: outcome.metrics for client, outcome in outcomes.items()},
            self.config.seed,
            self.config.lora.alpha / self.config.lora.rank,
            partial(self._run_merges, step) if self.pool.num_actors > 1 else None,
        )
        return uploads, sent.keys()

    def _validated(
        self,
        step: int,
        sent: Mapping[int, ClientState],
        received: Sequence[ClientState],
        names: Sequence[str] | None,
    ) -> dict[int, ClientState]:
        """Return the uploads that may be merged, and note the others."""
        expected = {
            client: [name for name in self.algorithm.pack(client, received[client]) if names is None or name in names]
            for client in sent
        }
        uploads, refused = validate_uploads(sent, received, expected)
        if refused:
            self.costs.refused |= refused
            clients = "; ".join(f"client {client}: {reason}" for client, reason in refused.items())
            self.observer.on_notice(Notice(f"step {step}: uploads were not merged ({clients})"))
        return uploads

    def _note_missing(self, step: int, missing: list[int]) -> None:
        self.folder.log_missing(step, missing)
        if missing:
            self.observer.on_notice(Notice(f"step {step}: {clients_text(missing)} missed the deadline"))

    def _run_merges(
        self, step: int, uploads: RoundUploads, names: Sequence[str], merges: Sequence[Merge]
    ) -> list[dict[str, np.ndarray]]:
        """Run merges on the pool, unless they are so few that this process is faster."""
        if sum(len(merge.members) for merge in merges) < MIN_MEMBERS:
            return self.algorithm.merge_each(replace(uploads, run_merges=None), names, merges)
        return merge_on_pool(step, uploads, names, merges, self.pool.num_actors, self._run_shared)

    def _run_shared(self, tasks: Sequence[MergeTask], uploads: RoundUploads) -> dict[int, dict[str, np.ndarray]]:
        """Run the merges of a round; the exchange measures their seconds."""
        done = [result for result in self.pool.run(tasks, shared=uploads) if result is not None]
        return {client: state for result in done for client, state in zip(result.clients, result.outcomes, strict=True)}

    @property
    def hears_a_part(self) -> bool:
        """Whether rounds have a part of the clients, or some were missing in the last one."""
        participants = self.config.training.clients_per_round or len(self.everyone)
        return participants < len(self.everyone) or bool(self.previous_missing)

    # -- neighbourhoods after phase 1 -------------------------------------------------------------------------------

    def neighbourhood(self, received: Sequence[ClientState], uploads: Mapping[int, ClientState]) -> NeighbourGraph:
        """Return the neighbourhoods for phase 2, from the last uploads that the coordinator knows."""
        started = time.perf_counter()
        states = [{**received[client], **uploads.get(client, {})} for client in self.everyone]
        adapters = [{n: v for n, v in state.items() if n not in self.algorithm.head_names} for state in states]
        graph = self.algorithm.phase2_graph(adapters, self.sizes)
        self.costs.add_seconds("aggregate", time.perf_counter() - started)
        return graph

    def recorded_neighbourhood(self) -> NeighbourGraph:
        """Return the neighbourhoods that the last round recorded; for a stage with ``needs_neighbours``."""
        recorded = next(record.neighbours for record in reversed(self.records) if record.neighbours is not None)
        return NeighbourGraph(np.array(recorded.members), np.array(recorded.weights))

    # -- cohorts and tasks ------------------------------------------------------------------------------------------

    def cohorts(self, clients: Sequence[int]) -> list[tuple[int, ...]]:
        """Divide ``clients`` into cohorts of about equal work."""
        return make_cohorts(clients, self.sizes, self.config.training.cohort_size) if clients else []

    def stack(self, cohort: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the states of the clients of a cohort, ``{name: [C, ...]}``."""
        return stack_states([self.states[client] for client in cohort])

    def run(self, tasks: Sequence[CohortTask], deadline_s: float | None = None) -> dict[int, Any]:
        """Run tasks on the pool, add up what they cost, and return ``{client: outcome}`` of the tasks that finished."""
        outcomes: dict[int, Any] = {}
        done, total = 0, sum(len(task.clients) for task in tasks)

        def tell(task: CohortTask, result: CohortResult[Any]) -> None:
            nonlocal done
            del result
            done += len(task.clients)
            self.observer.on_task(TaskDone(task.stage, len(task.clients), done, total))

        for result in self.pool.run(tasks, deadline_s, tell):
            if result is not None:
                self.costs.add(result)
                self._note_windows(result.windows)
                outcomes |= zip(result.clients, result.outcomes, strict=True)
        return outcomes

    def keep_windows(self) -> None:
        """Let all workers use the windows that earlier stages had to reduce, also after a resume.

        So the windows of a stage follow from the records before it, whatever the workers have met in this process.
        """
        noted: dict[str, int] = {}
        for record in self.records:
            for name, size in (record.reduced_windows or {}).items():
                noted[name] = min(size, noted.get(name, size))
        if noted:
            self.pool.reduce_windows(noted)

    def _note_windows(self, used: Mapping[str, int]) -> None:
        """Note the windows of a task that were smaller than planned: its last bits differ from those of the plan."""
        planned, noted = self.config.training.windows.model_dump(), self.costs.reduced_windows
        for name, size in used.items():
            if size < planned[name]:
                noted[name] = min(size, noted.get(name, size))


def _changed(merged: ClientState, own: ClientState, names: Sequence[str] | None) -> list[str]:
    """Return which of ``names`` the coordinator's answer changes; a client that was not heard keeps what it has."""
    return [
        name
        for name in (merged if names is None else names)
        if merged[name] is not own[name] and (merged[name] != own[name]).any()
    ]


def _is_finite(outcome: TrainOutcome) -> bool:
    """Return whether training ended with finite arrays and metrics, which a method's weights may depend on."""
    arrays_are_finite = all(bool(np.isfinite(value).all()) for value in outcome.state.values())
    return arrays_are_finite and all(map(math.isfinite, outcome.metrics.values()))

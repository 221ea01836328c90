"""What an evaluation measures on a run's clients, task by task; finished tasks are read from the measurement cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sylva_ray.attacks.state import NO_ANSWER
from sylva_ray.core.evaluation import CertifiedLevel, GalleryImage, Transfer
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.types import AttackSpec, stack_states
from sylva_ray.evaluation.cache import MeasurementCache
from sylva_ray.evaluation.plan import (
    RADII,
    EvaluationRequest,
    check_attacks,
    gallery_attack,
    transfer_attack,
)
from sylva_ray.evaluation.tables import Cost, Measured
from sylva_ray.federation.client.measuring import CertifyTask, EvaluateOutcome, EvaluateTask, ProbeTask, TransferTask
from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.cohorts import make_cohorts
from sylva_ray.federation.pool import ClientPool
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.metrics.certificates import certificates, certified_accuracy
from sylva_ray.metrics.checks import is_collapsed, predicts_one_class
from sylva_ray.models.peft_format import load_adapter
from sylva_ray.preparation.experiment import Prepared
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.transport.byzantine import byzantine_clients

WINDOW = 64
"""Images per client in one task, which is what an interrupted evaluation loses at most."""

ALPHA = 0.001
"""Probability that a certificate is wrong."""

MAX_SOURCES = 15
"""Other clients through which a client is attacked, at most; all of them in a fleet of up to 16."""

GALLERY_CANDIDATES = 8
"""Images per client among which those of the gallery are chosen."""

GALLERY_SIZE = 12
"""Images of the gallery, at most."""

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class EvaluationInput:
    """A finished run, ready to be attacked.

    Attributes:
        folder: of the run.
        prepared: its experiment, with the images of the evaluation.
        states: of the K clients.
        surrogates: states of the K clients of other runs, by run folder.
        inputs: digests of the data and the weights that are measured with.
        notices: what the user should know about them.
    """

    folder: RunFolder
    prepared: Prepared
    states: list[State]
    surrogates: Mapping[str, list[State]]
    inputs: Inputs | None = None
    notices: tuple[str, ...] = ()


class Progress(Protocol):
    """Observes the progress of an evaluation."""

    def on_measurement(self, name: str, num_tasks: int, num_known: int) -> None:
        """Handle the start of a measurement of ``num_tasks`` tasks, ``num_known`` of which are in the cache."""
        ...

    def on_task_measured(self, name: str) -> None:
        """Handle the end of one of its other tasks."""
        ...


class Measurements:
    """The measurements of one run. Each gives the pool the tasks that are not in the cache.

    Byzantine clients are measured, too. They count in no statistic over the fleet.

    Args:
        run: the run.
        request: what to measure.
        pool: where it is measured.
        progress: is notified of measurements and tasks.

    Attributes:
        left_out: the Byzantine clients, in ascending order.
    """

    def __init__(self, run: EvaluationInput, request: EvaluationRequest, pool: ClientPool, progress: Progress) -> None:
        self.run, self.request, self.pool, self.progress = run, request, pool, progress
        self.config, self.fleet = run.prepared.config, run.prepared.fleet
        changed = run.inputs if run.prepared.changed_inputs else None
        self.cache = MeasurementCache(run.folder.measurements, self.config, changed)
        self.everyone = range(self.fleet.num_clients)
        self.left_out = byzantine_clients(self.config)
        self.honest = [client for client in self.everyone if client not in self.left_out]
        sizes = [len(self.fleet.test_labels(client)) for client in self.everyone]
        self.cohorts = make_cohorts(list(self.everyone), sizes, self.config.training.cohort_size)
        self.longest = max(sizes)
        self.step = self.config.training.rounds
        self.majority = [self.fleet.client(client).majority_share for client in self.everyone]

    # -- measurements --------------------------------------------------------------------------------------------------

    def attacks(self, specs: Sequence[AttackSpec], limit: int | None = None) -> Measured:
        """Measure attacks on the test images of every client.

        Args:
            specs: the attacks; with none, unchanged images only.
            limit: the first images of each client; None: all.
        """
        length = self.longest if limit is None else min(limit, self.longest)
        labels = [self.fleet.test_labels(client)[:length] for client in self.everyone]
        measured = Measured(labels, distinct=self.fleet.num_test_images(self.honest, length))
        unique_specs: list[AttackSpec | None] = list({spec.label: spec for spec in specs}.values()) or [None]
        for spec in unique_specs:
            self._attack(spec, length, measured)
        return measured

    def _attack(self, spec: AttackSpec | None, length: int, measured: Measured) -> None:
        """Add to ``measured`` an attack (None: none) and the benign predictions, on the first ``length`` images."""
        benign: list[list[np.ndarray]] = [[] for _ in self.everyone]
        answers: list[list[np.ndarray]] = [[] for _ in self.everyone]
        distances: list[list[np.ndarray]] = [[] for _ in self.everyone]
        cost = Cost()
        specs = () if spec is None else (spec,)
        tasks = [
            EvaluateTask(self.step, cohort, self._stack(cohort), specs, min(WINDOW, length - first), first)
            for first in range(0, length, WINDOW)
            for cohort in self.cohorts
        ]
        for task, outcomes, seconds in self._run(tasks, spec.label if spec else "benign"):
            for client, outcome in zip(task.clients, outcomes, strict=True):
                if not outcome.values:  # the client has no images in this window
                    continue
                benign[client].append(outcome.predictions["benign"])
                if spec:
                    answers[client].append(outcome.predictions[spec.label])
                    distances[client].append(outcome.of_kind("distances")[spec.label])
            if spec:
                cost.add(outcomes, spec.label, seconds)
        measured.answers["benign"] = [np.concatenate(windows) for windows in benign]
        if spec:
            measured.answers[spec.label] = [np.concatenate(windows) for windows in answers]
            measured.distances[spec.label] = [np.concatenate(windows) for windows in distances]
            measured.costs[spec.label] = cost

    def probes(self) -> dict[str, float]:
        """Return the probes of the checks, means over the images of the fleet; of ``difference`` the largest value."""
        attack = check_attacks(self.request.epsilon, self.fleet.num_classes)["pgd"]
        tasks = [ProbeTask(self.step, c, self._stack(c), attack, self.request.subset_images) for c in self.cohorts]
        by_name: dict[str, list[np.ndarray]] = {}
        for task, outcomes, _ in self._run(tasks, "probes"):
            for client, outcome in zip(task.clients, outcomes, strict=True):
                if client in self.left_out:
                    continue
                for name, values in outcome.of_kind("probe").items():
                    by_name.setdefault(name, []).append(values)
        flat = {name: np.concatenate(values) for name, values in by_name.items()}
        return {name: float(v.max() if name == "difference" else v.mean()) for name, v in flat.items()}

    def transfer(self) -> Transfer:
        """Measure every client on images that were made against other clients and against surrogates."""
        num_clients, attack = len(self.everyone), transfer_attack(self.request.epsilon)
        num_shifts = min(num_clients, MAX_SOURCES + 1)
        shifts = np.unique(np.linspace(0, num_clients - 1, num_shifts).round().astype(int)).tolist()
        matrix: list[list[float | None]] = [[None] * num_clients for _ in self.everyone]  # [source][target]
        for shift in shifts:
            sources = [self.run.states[(client + shift) % num_clients] for client in self.everyone]
            for target, accuracy in enumerate(self._transferred(sources, attack, f"transfer {shift}")):
                matrix[(target + shift) % num_clients][target] = accuracy
        surrogates = {}
        for name, states in self.run.surrogates.items():
            accuracies = self._transferred(states, attack, f"transfer from {name}")
            surrogates[name] = float(np.mean([accuracies[client] for client in self.honest]))
        by_target = [
            [value for source in self.honest if source != target and (value := matrix[source][target]) is not None]
            for target in self.honest
        ]
        from_others = [accuracies for accuracies in by_target if accuracies]
        candidates = list(surrogates.values())
        if from_others:
            candidates.insert(0, float(np.mean([min(accuracies) for accuracies in from_others])))
        return Transfer(
            attack=attack.label,
            images_per_client=min(self.request.subset_images, self.longest),
            matrix=matrix,
            own=float(np.mean([matrix[client][client] for client in self.honest])),
            others_mean=float(np.mean([np.mean(accuracies) for accuracies in from_others])) if from_others else None,
            surrogates=surrogates,
            strongest=min(candidates, default=None),
        )

    def _transferred(self, sources: Sequence[State], attack: AttackSpec, name: str) -> list[float]:
        """Return the accuracy of each client on images that were made against the state of ``sources`` for it."""
        tasks = [
            TransferTask(
                self.step, c, self._stack(c), stack_states([sources[i] for i in c]), attack, self.request.subset_images
            )
            for c in self.cohorts
        ]
        accuracies: dict[int, float] = {}
        for task, outcomes, _ in self._run(tasks, name):
            for client, outcome in zip(task.clients, outcomes, strict=True):
                answers = outcome.predictions["transfer"]
                accuracies[client] = float(np.mean(answers == self.fleet.test_labels(client)[: len(answers)]))
        return [accuracies[client] for client in self.everyone]

    def certified(self, sigma: float) -> CertifiedLevel:
        """Measure the certified accuracy of the smoothed clients at growing L2 radius."""
        num_draws = self.request.num_draws
        tasks = [
            CertifyTask(self.step, c, self._stack(c), sigma, num_draws, self.request.subset_images)
            for c in self.cohorts
        ]
        rows: dict[int, list[float]] = {}
        abstained, images = 0, 0
        for task, outcomes, _ in self._run(tasks, f"certify {sigma:g}"):
            for client, outcome in zip(task.clients, outcomes, strict=True):
                votes = outcome.of_kind("votes")
                classes, radii = certificates(votes["guess"], votes["hits"], num_draws, sigma, ALPHA)
                labels = self.fleet.test_labels(client)[: len(classes)]
                rows[client] = certified_accuracy(classes, radii, labels, RADII)
                if client not in self.left_out:
                    abstained, images = abstained + int(np.sum(classes < 0)), images + len(classes)
        return CertifiedLevel(
            sigma=sigma,
            draws=num_draws,
            alpha=ALPHA,
            images=images,
            abstained=abstained / images,
            radii=list(RADII),
            mean=np.mean([rows[client] for client in self.honest], axis=0).tolist(),
            per_client=[rows[client] for client in self.everyone],
        )

    def gallery(self) -> list[GalleryImage]:
        """Return the adversarial images that are closest to the originals, the closest first."""
        attack = gallery_attack(self.request.epsilon)
        tasks = [
            EvaluateTask(self.step, c, self._stack(c), (attack,), GALLERY_CANDIDATES, keep=True) for c in self.cohorts
        ]
        candidates: list[tuple[float, int, int]] = []  # (distance, client, image)
        by_client: dict[int, EvaluateOutcome] = {}
        for task, outcomes, _ in self._run(tasks, "gallery"):
            for client, outcome in zip(task.clients, outcomes, strict=True):
                by_client[client] = outcome
                is_correct = outcome.predictions["benign"] == self.fleet.test_labels(client)[:GALLERY_CANDIDATES]
                distances = outcome.of_kind("distances")[attack.label]
                if client in self.left_out:
                    continue
                rows = np.flatnonzero(is_correct & np.isfinite(distances) & (distances > 0))
                candidates += [(float(distances[row]), client, int(row)) for row in rows]
        return [
            self._gallery_image(client, row, by_client[client], attack.label)
            for _, client, row in sorted(candidates)[:GALLERY_SIZE]
        ]

    def _gallery_image(self, client: int, row: int, outcome: EvaluateOutcome, label: str) -> GalleryImage:
        test, names = self.fleet.client(client).test, self.fleet.dataset.class_names
        answer = outcome.predictions[label][row]
        return GalleryImage(
            client=client,
            image=row,
            label=str(names[test.labels[row]]),
            answer="not a number" if answer == NO_ANSWER else str(names[answer]),
            distance=float(outcome.of_kind("distances")[label][row]),
            clean=test.images[row].tolist(),
            adversarial=np.round(outcome.of_kind("images")[label][row] * 255, 1).tolist(),
        )

    # -- facts about the fleet -----------------------------------------------------------------------------------------

    def collapsed(self, worst: Sequence[np.ndarray]) -> list[bool]:
        """Return whether each honest client is no better in the worst case than always answering its majority class."""
        flags = []
        for client, answers in enumerate(worst):
            labels = self.fleet.test_labels(client)
            one_class = predicts_one_class(answers, labels)
            accuracy = float(np.mean(answers == labels))
            flags.append(client not in self.left_out and is_collapsed(accuracy, self.majority[client], one_class))
        return flags

    def exported(self) -> int | None:
        """Return how many exported adapters equal the attacked states bit for bit; None if one of them does not.

        What else a state holds, such as the probe of a teacher, is not exported and not compared. Whole models and
        large fleets are not exported: what is attacked are the states of the last checkpoint.
        """
        compared = 0
        for client, state in enumerate(self.run.states):
            folder = self.run.folder.adapter(client)
            if not folder.exists():
                continue
            exported = load_adapter(folder)
            names = [name for name in state if ".lora_" in name or name in self.run.prepared.backbone]
            if any(name not in exported or not np.array_equal(exported[name], state[name]) for name in names):
                return None
            compared += 1
        return compared

    # -- running tasks -------------------------------------------------------------------------------------------------

    def _stack(self, cohort: Sequence[int]) -> State:
        return stack_states([self.run.states[client] for client in cohort])

    def _run(self, tasks: Sequence[CohortTask], name: str) -> Iterator[tuple[CohortTask, list[EvaluateOutcome], float]]:
        """Yield ``(task, outcomes, worker seconds)`` of every task; 0 seconds for outcomes from the cache."""
        cached = [self.cache.load(task) for task in tasks]
        missing = [task for task, outcomes in zip(tasks, cached, strict=True) if outcomes is None]
        self.progress.on_measurement(name, len(tasks), len(tasks) - len(missing))

        def save(task: CohortTask, result: CohortResult[EvaluateOutcome]) -> None:
            self.cache.save(task, result.outcomes)
            self.progress.on_task_measured(name)

        results = iter(self.pool.run(missing, None, save))
        for task, outcomes in zip(tasks, cached, strict=True):
            if outcomes is not None:
                yield task, outcomes, 0.0
                continue
            result = next(results)
            assert result is not None, "there is no deadline"
            yield task, list(result.outcomes), result.seconds.get("evaluate", 0.0)

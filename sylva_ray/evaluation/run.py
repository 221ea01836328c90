"""`sylva-ray evaluate`: attack a run's deployed, personal models again, with anything.

    run folder ──► clients' states ──► tasks ──► pool ──► parts on disk ──► evaluation.json

`prepare_evaluation` checks everything and writes nothing. `run_evaluation` is idempotent: finished measurements are
read from ``evaluation/``, so an evaluation that was cut, or asks for more, only measures what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.core.errors import UserError
from sylva_ray.core.evaluation import CertifiedLevel, Curves, Evaluation, GalleryImage, Transfer
from sylva_ray.core.summary import Spread
from sylva_ray.core.types import AttackSpec, stack_states
from sylva_ray.evaluation import tables
from sylva_ray.evaluation.cache import MeasurementCache
from sylva_ray.evaluation.plan import (
    EPSILONS,
    RADII,
    STEPS,
    EvaluationRequest,
    check_attacks,
    epsilon_curve,
    gallery_attack,
    steps_curve,
    transfer_attack,
)
from sylva_ray.evaluation.run_checks import RunFacts, run_checks
from sylva_ray.evaluation.tables import Cost, Measured
from sylva_ray.federation.client.measuring import CertifyTask, EvaluateOutcome, EvaluateTask, ProbeTask, TransferTask
from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.cohorts import make_cohorts
from sylva_ray.federation.pool import ClientPool
from sylva_ray.federation.summary import threat_model
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.metrics.certificates import certificates, certified_accuracy
from sylva_ray.metrics.checks import is_collapsed, predicts_one_class
from sylva_ray.models.peft_format import load_adapter
from sylva_ray.preparation.experiment import Prepared, prepare
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.transport.byzantine import byzantine_clients

WINDOW = 64
"""Images per client in one task: what a cut evaluation loses at most."""

ALPHA = 0.001
"""Probability that a certificate is wrong."""

MAX_SOURCES = 15
"""Other clients through which a client is attacked; all of them in a fleet of up to 16."""

GALLERY_IMAGES, SHOWN = 8, 12
"""Images per client among which the gallery looks, and how many it shows."""

FREE = ("cluster.", "training.device", "training.attention", "evaluation.precision")
"""Settings that an evaluation may change."""

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class EvaluationInput:
    """A finished run, ready to be attacked. ``surrogates`` are other runs' states, client by client."""

    folder: RunFolder
    prepared: Prepared
    states: list[State]
    surrogates: Mapping[str, list[State]]


def prepare_evaluation(
    folder: RunFolder, images: int | None, surrogates: Sequence[RunFolder], overrides: Sequence[str]
) -> EvaluationInput:
    """Load a finished run, with ``images`` test images per client in place of what it had.

    Raises:
        UserError: no finished run there, an override that would change what is measured, a surrogate of another kind.
    """
    for override in overrides:
        if not override.startswith(FREE):
            raise UserError(
                "override",
                override,
                "would change the run; only cluster.*, training.device, training.attention, evaluation.precision are free",
            )
    states = folder.load_states()
    if not folder.summary_file.exists():
        raise UserError("RUN", str(folder), f"is not finished; first: sylva-ray run {folder} --resume")
    config = folder.load_config(overrides)
    if images is not None:
        partition = config.partition.model_copy(update={"test_samples": images})
        keep = config.dataset.test_pool == "train"
        dataset = config.dataset.model_copy(update={"max_test": config.dataset.max_test if keep else None})
        config = config.model_copy(update={"partition": partition, "dataset": dataset})
    prepared = prepare(config)
    missing = [client for client in range(len(states)) if not folder.adapter(client).exists()]
    if missing and create_algorithm(config.algorithm).parameters.model == "lora":
        raise UserError(
            "RUN", str(folder), f"has no adapters of client {missing[0]} (adapters/ is part of a finished run)"
        )
    return EvaluationInput(folder, prepared, states, {str(other): _surrogate(other, states) for other in surrogates})


def _surrogate(folder: RunFolder, states: Sequence[State]) -> list[State]:
    other = folder.load_states()
    shapes = {name: value.shape for name, value in states[0].items()}
    if len(other) != len(states) or {name: value.shape for name, value in other[0].items()} != shapes:
        raise UserError(
            "--surrogate", str(folder), "has other clients or another kind of model; transfer needs the same of both"
        )
    return other


class Progress(Protocol):
    """What an evaluation tells of its progress."""

    def on_measurement(self, name: str, num_tasks: int, num_known: int) -> None:
        """Hear that a measurement of ``num_tasks`` tasks begins, of which ``num_known`` are on disk already."""
        ...

    def on_task_measured(self, name: str) -> None:
        """Hear that one of its other tasks is done."""
        ...


def run_evaluation(
    run: EvaluationInput, request: EvaluationRequest, pool: ClientPool, progress: Progress
) -> Evaluation:
    """Measure what is asked for.

    Args:
        run: the run.
        request: what to measure.
        pool: where it is measured.
        progress: hears of measurements and tasks.
    """
    work = _Work(run, request, pool, progress)
    config, fleet = run.prepared.config, run.prepared.fleet
    headline = work.attacks(request.attacks)
    left_out = byzantine_clients(config)
    model = threat_model(config, request.attacks)
    bounded = [spec for spec in request.attacks if math.isfinite(spec.epsilon)]
    main = [spec for spec in bounded if spec.norm == "linf" and spec.epsilon == request.epsilon] or bounded
    worst = tables.worst_answers(headline, [spec.label for spec in main])
    collapsed = work.collapsed(worst, left_out)
    images = int(sum(map(len, headline.without(left_out).labels)))
    transfer = work.transfer() if request.transfer else None
    curves, checks = None, None
    if request.curves or request.checks:
        epsilons = dict(zip(EPSILONS, epsilon_curve(), strict=True))
        steps = dict(zip(map(float, STEPS), steps_curve(request.epsilon), strict=True))
        extra = check_attacks(request.epsilon, fleet.num_classes) if request.checks else {}
        specs = [*epsilons.values(), *steps.values(), *extra.values()]
        few = work.attacks(specs, request.subset_images).without(left_out)
        curves = Curves(epsilon=tables.curve(epsilons, few), steps=tables.curve(steps, few))
        if request.checks:
            facts = RunFacts(request.epsilon, fleet.num_classes, model, images, work.deployed(), collapsed)
            checks = run_checks(few, work.probes(), facts, transfer.strongest if transfer else None)
    return Evaluation(
        run=config.name,
        algorithm=config.algorithm.name,
        images=images,
        threat_model=model,
        benign=tables.condition_row(headline.answers["benign"], headline.labels, left_out),
        attacks={spec.label: tables.attack_row(spec, headline, left_out) for spec in request.attacks},
        worst_case=tables.worst_cases(request.attacks, headline, left_out),
        majority=Spread.from_values(work.majority, left_out),
        per_class=tables.per_class(headline, worst, fleet.num_classes),
        collapsed=[client for client, bad in enumerate(collapsed) if bad],
        transfer=transfer,
        curves=curves,
        checks=checks,
        certified=[work.certified(sigma, left_out) for sigma in request.sigmas] or None,
        gallery=work.gallery(),
    )


class _Work:
    """The measurements of one run; each asks the pool for what is not on disk."""

    def __init__(
        self, given: EvaluationInput, request: EvaluationRequest, pool: ClientPool, progress: Progress
    ) -> None:
        self.given, self.request, self.pool, self.progress = given, request, pool, progress
        self.config, self.fleet = given.prepared.config, given.prepared.fleet
        self.cache = MeasurementCache(given.folder.measurements, self.config)
        self.everyone = range(self.fleet.num_clients)
        sizes = [len(self.fleet.test_labels(client)) for client in self.everyone]
        self.cohorts = make_cohorts(list(self.everyone), sizes, self.config.training.cohort_size)
        self.longest = max(sizes)
        self.round = self.config.training.rounds
        self.majority = [self.fleet.client(client).majority_share for client in self.everyone]

    # -- measurements --------------------------------------------------------------------------------------------------

    def attacks(self, specs: Sequence[AttackSpec], limit: int | None = None) -> Measured:
        """Every attack on every client's test images (the first ``limit``)."""
        length = self.longest if limit is None else min(limit, self.longest)
        asked: list[AttackSpec | None] = list({spec.label: spec for spec in specs}.values()) or [None]
        labels = [self.fleet.test_labels(client)[:length] for client in self.everyone]
        measured = Measured(labels)
        for spec in asked:
            answers: list[list[np.ndarray]] = [[] for _ in self.everyone]
            benign: list[list[np.ndarray]] = [[] for _ in self.everyone]
            distances: list[list[np.ndarray]] = [[] for _ in self.everyone]
            cost = Cost()
            tasks = [
                EvaluateTask(
                    self.round, cohort, self._stack(cohort), (spec,) if spec else (), min(WINDOW, length - first), first
                )
                for first in range(0, length, WINDOW)
                for cohort in self.cohorts
            ]
            for task, outcomes, seconds in self._run(tasks, spec.label if spec else "benign"):
                for client, outcome in zip(task.clients, outcomes, strict=True):
                    if not outcome.values:  # a client with fewer images than this window's first
                        continue
                    benign[client].append(outcome.predictions["benign"])
                    if spec:
                        answers[client].append(outcome.predictions[spec.label])
                        distances[client].append(outcome.of_kind("distances")[spec.label])
                if spec:
                    forwards, backwards = outcomes[0].passes.get(spec.label, (0, 0))
                    cost.forwards += forwards
                    cost.backwards += backwards
                if seconds:
                    cost.seconds += seconds
                    cost.timed_images += sum(len(outcome.predictions.get("benign", ())) for outcome in outcomes)
            measured.answers["benign"] = [np.concatenate(own) for own in benign]
            if spec:
                measured.answers[spec.label] = [np.concatenate(own) for own in answers]
                measured.distances[spec.label] = [np.concatenate(own) for own in distances]
                measured.costs[spec.label] = cost
        return measured

    def probes(self) -> dict[str, float]:
        """Means over the fleet's images; of ``difference`` the largest."""
        attack = check_attacks(self.request.epsilon, self.fleet.num_classes)["pgd"]
        tasks = [ProbeTask(self.round, c, self._stack(c), attack, self.request.subset_images) for c in self.cohorts]
        values: dict[str, list[np.ndarray]] = {}
        for _, outcomes, _ in self._run(tasks, "probes"):
            for outcome in outcomes:
                for name, own in outcome.of_kind("probe").items():
                    values.setdefault(name, []).append(own)
        flat = {name: np.concatenate(own) for name, own in values.items()}
        return {name: float(own.max() if name == "difference" else own.mean()) for name, own in flat.items()}

    def transfer(self) -> Transfer:
        """``matrix[source][target]``: accuracy of the target on images made against the source (None: not measured)."""
        count, attack = len(self.everyone), transfer_attack(self.request.epsilon)
        shifts = np.unique(np.linspace(0, count - 1, min(count, MAX_SOURCES + 1)).round().astype(int)).tolist()
        matrix: list[list[float | None]] = [[None] * count for _ in self.everyone]
        for shift in shifts:
            sources = [self.given.states[(client + shift) % count] for client in self.everyone]
            for target, accuracy in enumerate(self._transferred(sources, attack, f"transfer {shift}")):
                matrix[(target + shift) % count][target] = accuracy
        others = {
            name: float(np.mean(self._transferred(states, attack, f"transfer from {name}")))
            for name, states in self.given.surrogates.items()
        }
        off = [[m for i, row in enumerate(matrix) if i != j and (m := row[j]) is not None] for j in self.everyone]
        strongest = [min(own) for own in off if own]
        return Transfer(
            attack=attack.label,
            images_per_client=min(self.request.subset_images, self.longest),
            matrix=matrix,
            own=float(np.mean([matrix[j][j] for j in self.everyone])),
            others_mean=float(np.mean([np.mean(own) for own in off if own])) if strongest else None,
            surrogates=others,
            strongest=min([float(np.mean(strongest))] * bool(strongest) + list(others.values()), default=None),
        )

    def _transferred(self, sources: Sequence[State], attack: AttackSpec, name: str) -> list[float]:
        tasks = [
            TransferTask(
                self.round, c, self._stack(c), stack_states([sources[i] for i in c]), attack, self.request.subset_images
            )
            for c in self.cohorts
        ]
        found: dict[int, float] = {}
        for task, outcomes, _ in self._run(tasks, name):
            for client, outcome in zip(task.clients, outcomes, strict=True):
                answers = outcome.predictions["transfer"]
                found[client] = float(np.mean(answers == self.fleet.test_labels(client)[: len(answers)]))
        return [found[client] for client in self.everyone]

    def certified(self, sigma: float, left_out: Sequence[int]) -> CertifiedLevel:
        """Certified accuracy of the smoothed clients at growing L2 radius."""
        num_draws = self.request.num_draws
        tasks = [
            CertifyTask(self.round, c, self._stack(c), sigma, num_draws, self.request.subset_images)
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
                abstained, images = abstained + int(np.sum(classes < 0)), images + len(classes)
        honest = [rows[client] for client in self.everyone if client not in left_out]
        return CertifiedLevel(
            sigma=sigma,
            draws=num_draws,
            alpha=ALPHA,
            images=images,
            abstained=abstained / images,
            radii=list(RADII),
            mean=np.mean(honest, axis=0).tolist(),
            per_client=[rows[client] for client in self.everyone],
        )

    def gallery(self) -> list[GalleryImage]:
        """The adversarial images that moved least: pixels (``[3, H, W]`` of 0..255, one decimal), labels, distance."""
        attack = gallery_attack(self.request.epsilon)
        tasks = [EvaluateTask(self.round, c, self._stack(c), (attack,), GALLERY_IMAGES, 0, True) for c in self.cohorts]
        shown = []
        for task, outcomes, _ in self._run(tasks, "gallery"):
            for client, outcome in zip(task.clients, outcomes, strict=True):
                test = self.fleet.client(client).test
                answers, benign = outcome.predictions[attack.label], outcome.predictions["benign"]
                for row, distance in enumerate(outcome.of_kind("distances")[attack.label]):
                    if np.isfinite(distance) and distance > 0 and benign[row] == test.labels[row]:
                        shown.append(
                            (float(distance), client, row, int(test.labels[row]), int(answers[row]), outcome, test)
                        )
        shown.sort(key=lambda item: item[:3])
        names = self.fleet.dataset.class_names
        return [
            GalleryImage(
                client=client,
                image=row,
                label=str(names[label]),
                answer=str(names[answer]),
                distance=distance,
                clean=test.images[row].tolist(),
                adversarial=np.round(outcome.of_kind("images")[attack.label][row] * 255, 1).tolist(),
            )
            for distance, client, row, label, answer, outcome, test in shown[:SHOWN]
        ]

    # -- facts about the fleet -----------------------------------------------------------------------------------------

    def collapsed(self, worst: Sequence[np.ndarray], left_out: Sequence[int]) -> list[bool]:
        """Whose worst case is no better than always answering the majority class."""
        flags = []
        for client, answers in enumerate(worst):
            labels = self.fleet.test_labels(client)
            one_class = predicts_one_class(answers, labels)
            right = float(np.mean(answers == labels))
            flags.append(client not in left_out and is_collapsed(right, self.majority[client], one_class))
        return flags

    def deployed(self) -> bool:
        """Whether the states attacked are, bit for bit, the exported adapters (there are none of full models)."""
        for client, state in enumerate(self.given.states):
            folder = self.given.folder.adapter(client)
            if not folder.exists():
                continue
            exported = load_adapter(folder)
            if exported.keys() != state.keys() or any(not np.array_equal(exported[n], state[n]) for n in state):
                return False
        return True

    # -- running tasks -------------------------------------------------------------------------------------------------

    def _stack(self, cohort: Sequence[int]) -> State:
        return stack_states([self.given.states[client] for client in cohort])

    def _run(self, tasks: Sequence[CohortTask], name: str) -> Iterator[tuple[CohortTask, list[EvaluateOutcome], float]]:
        """``(task, outcomes, worker's seconds)`` of every task; 0 seconds for what was on disk."""
        known = [self.cache.load(task) for task in tasks]
        missing = [task for task, part in zip(tasks, known, strict=True) if part is None]
        self.progress.on_measurement(name, len(tasks), len(tasks) - len(missing))

        def keep(task: CohortTask, result: CohortResult) -> None:
            self.cache.keep(task, list(result.outcomes))
            self.progress.on_task_measured(name)

        results = iter(self.pool.run(missing, None, keep))
        for task, part in zip(tasks, known, strict=True):
            if part is not None:
                yield task, part, 0.0
                continue
            result = next(results)
            assert result is not None, "there is no deadline"
            yield task, list(result.outcomes), result.seconds.get("evaluate", 0.0)

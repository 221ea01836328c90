"""Tasks that measure the deployed models on test images: answers, transfer, the checks' probes, certificates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from sylva_ray.attacks.registry import attack_stack
from sylva_ray.attacks.transfer import transfer
from sylva_ray.core.types import AttackSpec, ClientImages, ParameterStack, Split, StateStack
from sylva_ray.federation.client.batches import client_images, split_draws
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.metrics.probe import binarization_test, gradient_health
from sylva_ray.metrics.smoothing import votes
from sylva_ray.models.cohort import to_parameters
from sylva_ray.models.kernels import DTYPES

EVALUATION_ROWS = 256
"""Images in one forward of an evaluation."""


NO_ATTACK = AttackSpec("pgd", 0.0, 1, 0.0)
"""Changes nothing; what a task has to be given another for."""


@dataclass(frozen=True)
class EvaluateOutcome:
    """What was measured on n of a client's images: ``values["KIND/NAME"] [n, ...]``.

    KIND is ``predictions`` (NAME ``benign`` or an attack's label; int64), ``distances`` (of the adversarial images found, in the
    attack's norm; infinite: none), ``images`` (those images, if kept), ``probe`` (`sylva_ray.metrics.probe`) or ``votes``
    (`sylva_ray.metrics.smoothing`). ``passes[attack]`` is how many images of the whole cohort went forward and backward."""

    values: Mapping[str, np.ndarray]
    passes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def of_kind(self, kind: str) -> dict[str, np.ndarray]:
        """``{NAME: values}`` of one kind."""
        return {name.removeprefix(f"{kind}/"): v for name, v in self.values.items() if name.startswith(f"{kind}/")}

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """``{condition: [n]}``."""
        return self.of_kind("predictions")


@dataclass(frozen=True)
class EvaluateTask(CohortTask):
    """Answers on the test images, benign and under each attack: per client ``max_samples`` (None: all) from number ``first`` on.

    With ``keep`` the adversarial images come back as well."""

    attacks: tuple[AttackSpec, ...] = ()
    max_samples: int | None = None
    first: int = 0
    keep: bool = False

    stage: ClassVar[str] = "evaluate"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[EvaluateOutcome]:
        """See `CohortTask`."""
        found = _Answers(len(self.clients))
        for first, pieces, images in windows(worker, self):
            with torch.no_grad():
                found.add("predictions/benign", worker.model.forward(params, images.x, images.owner).argmax(1), images)
            for attack in self.attacks:
                draws = split_draws(worker.config.seed, attack.label, self.clients, pieces, first)
                precision = DTYPES[worker.config.evaluation.precision]
                result = attack_stack(worker.model, params, images, attack, draws.to(worker.device), precision)
                found.add(f"predictions/{attack.label}", result.predictions, images)
                found.add(f"distances/{attack.label}", result.distance, images)
                if self.keep:
                    found.add(f"images/{attack.label}", result.x_adv, images)
                found.count(attack.label, result.forwards, result.backwards)
        return found.outcomes()


@dataclass(frozen=True)
class TransferTask(CohortTask):
    """Images made against ``sources`` (a stack like ``states``, client by client) and answered by ``states``."""

    sources: StateStack = field(default_factory=dict)
    attack: AttackSpec = NO_ATTACK
    max_samples: int | None = None
    first: int = 0

    stage: ClassVar[str] = "transfer"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[EvaluateOutcome]:
        """See `CohortTask`."""
        sources = to_parameters(self.sources, worker.device, torch.float32)
        found = _Answers(len(self.clients))
        for first, pieces, images in windows(worker, self):
            draws = split_draws(worker.config.seed, "transfer", self.clients, pieces, first).to(worker.device)
            predictions = transfer(worker.model, sources, params, images, self.attack, draws)
            found.add("predictions/transfer", predictions, images)
        return found.outcomes()


@dataclass(frozen=True)
class ProbeTask(CohortTask):
    """What checks S10 and S13 measure, on ``max_samples`` test images per client."""

    attack: AttackSpec = NO_ATTACK
    max_samples: int | None = None
    first: int = 0

    stage: ClassVar[str] = "probe"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[EvaluateOutcome]:
        """See `CohortTask`."""
        found = _Answers(len(self.clients))
        for first, pieces, images in windows(worker, self):
            draws = split_draws(worker.config.seed, "probe", self.clients, pieces, first).to(worker.device)
            measured = gradient_health(worker.model, params, images, self.attack, draws)
            measured |= binarization_test(worker.model, params, images, self.attack, draws)
            for name, values in measured.items():
                found.add(f"probe/{name}", values, images)
        return found.outcomes()


@dataclass(frozen=True)
class CertifyTask(CohortTask):
    """Randomised smoothing of ``max_samples`` test images per client from number ``first`` on."""

    sigma: float = 0.0
    num_draws: int = 1000
    max_samples: int | None = None
    first: int = 0

    stage: ClassVar[str] = "certify"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[EvaluateOutcome]:
        """See `CohortTask`."""
        found = _Answers(len(self.clients))
        for first, pieces, images in windows(worker, self):
            draws = split_draws(worker.config.seed, "smoothing", self.clients, pieces, first).to(worker.device)
            guess, hits = votes(worker.model, params, images, self.sigma, self.num_draws, draws)
            found.add("votes/guess", guess, images)
            found.add("votes/hits", hits, images)
        return found.outcomes()


Measurement = EvaluateTask | TransferTask | ProbeTask | CertifyTask


def windows(worker: CohortWorker, task: Measurement) -> Iterator[tuple[int, list[Split], ClientImages]]:
    """Flat batches of at most `EVALUATION_ROWS` test images, some of each client's: number of the first, pieces, tensors."""
    tests = [worker.fleet.client(client).test for client in task.clients]
    rows = max(1, EVALUATION_ROWS // len(tests))
    longest = max(len(test) for test in tests)
    end = longest if task.max_samples is None else min(longest, task.first + task.max_samples)
    with worker.stopwatch("evaluate"):
        for first in range(task.first, end, rows):
            window = slice(first, min(first + rows, end))
            pieces = [Split(test.images[window], test.labels[window]) for test in tests]
            yield first, pieces, client_images(pieces, torch.float32, worker.device)


class _Answers:
    """What the clients of a cohort answered so far, window by window."""

    def __init__(self, num_clients: int) -> None:
        self._parts: list[dict[str, list[np.ndarray]]] = [{} for _ in range(num_clients)]
        self._passes: dict[str, tuple[int, int]] = {}

    def add(self, name: str, values: torch.Tensor, images: ClientImages) -> None:
        """Add the values ``[N, ...]`` of a flat batch to those of the clients."""
        for values_by_name, client_values in zip(self._parts, images.split_by_client(values), strict=True):
            values_by_name.setdefault(name, []).append(client_values)

    def count(self, attack: str, forwards: int, backwards: int) -> None:
        """Add to an attack's passes."""
        before = self._passes.get(attack, (0, 0))
        self._passes[attack] = (before[0] + forwards, before[1] + backwards)

    def outcomes(self) -> list[EvaluateOutcome]:
        """One per client, windows joined."""
        joined = [{name: np.concatenate(windows) for name, windows in own.items()} for own in self._parts]
        return [EvaluateOutcome(values, self._passes) for values in joined]

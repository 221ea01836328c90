"""Tasks that measure the deployed models on test images: predictions, transfer, probes of the checks, certificates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from sylva_ray.attacks.registry import attack_stack, find_attack
from sylva_ray.attacks.state import predicted_classes
from sylva_ray.attacks.transfer import transfer
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import torch_dtype
from sylva_ray.core.types import AttackSpec, ClientImages, ParameterStack, Split, StateStack
from sylva_ray.federation.client.batches import client_images, split_draws
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.metrics.probe import binarization_test, gradient_health
from sylva_ray.metrics.smoothing import votes
from sylva_ray.models.cohort import to_parameters

EVALUATION_ROWS = 256
"""Images in one forward of an evaluation."""


@dataclass(frozen=True)
class EvaluateOutcome:
    """What was measured on n images of a client.

    Attributes:
        values: ``{"KIND/NAME": [n, ...]}``. KIND is ``predictions`` (NAME is ``benign`` or the label of an attack;
            int64), ``distances`` (of the adversarial images, in the norm of the attack; infinite where there is none),
            ``images`` (the adversarial images, if they are kept), ``probe`` (`sylva_ray.metrics.probe`) or ``votes``
            (`sylva_ray.metrics.smoothing`).
        passes: ``{attack: (forwards, backwards)}``, images of the whole cohort that were passed forward and backward.
    """

    values: Mapping[str, np.ndarray]
    passes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def of_kind(self, kind: str) -> dict[str, np.ndarray]:
        """Return ``{NAME: values}`` of one kind."""
        return {name.removeprefix(f"{kind}/"): v for name, v in self.values.items() if name.startswith(f"{kind}/")}

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """The predicted classes, ``{condition: [n]}``."""
        return self.of_kind("predictions")


@dataclass(frozen=True)
class EvaluateTask(CohortTask):
    """Predictions on test images, benign and under each attack.

    Attributes:
        attacks: the attacks.
        max_samples: test images per client; None: all.
        first: position of the first one.
        keep: whether the adversarial images are returned, too.
    """

    attacks: tuple[AttackSpec, ...] = ()
    max_samples: int | None = None
    first: int = 0
    keep: bool = False

    stage: ClassVar[str] = "evaluate"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[EvaluateOutcome]:
        """See `CohortTask`."""
        collected = _Collector(len(self.clients))
        for first, pieces, images in windows(worker, self):
            with torch.no_grad():
                logits = worker.model.forward(params, images.x, images.owner)
                collected.add("predictions/benign", predicted_classes(logits), images)
            for attack in self.attacks:
                find_attack(attack.name)  # the label of an attack of one's own depends on its class
                draws = split_draws(worker.config.seed, attack.label, self.clients, pieces, first)
                precision = torch_dtype(worker.config.evaluation.precision)
                result = attack_stack(worker.model, params, images, attack, draws.to(worker.device), precision)
                collected.add(f"predictions/{attack.label}", result.predictions, images)
                collected.add(f"distances/{attack.label}", result.distance, images)
                if self.keep:
                    collected.add(f"images/{attack.label}", result.x_adv, images)
                collected.count(attack.label, result.forwards, result.backwards)
        return collected.outcomes()


@dataclass(frozen=True)
class TransferTask(CohortTask):
    """Predictions on images that were made against other models.

    Attributes:
        sources: the states that the images are made against, stacked like ``states``, which predict.
        attack: makes the images.
        max_samples: test images per client; None: all.
        first: position of the first one.
    """

    sources: StateStack
    attack: AttackSpec
    max_samples: int | None = None
    first: int = 0

    stage: ClassVar[str] = "transfer"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[EvaluateOutcome]:
        """See `CohortTask`."""
        sources = to_parameters(self.sources, worker.device, torch.float32)
        collected = _Collector(len(self.clients))
        for first, pieces, images in windows(worker, self):
            draws = split_draws(worker.config.seed, "transfer", self.clients, pieces, first).to(worker.device)
            predictions = transfer(worker.model, sources, params, images, self.attack, draws)
            collected.add("predictions/transfer", predictions, images)
        return collected.outcomes()


@dataclass(frozen=True)
class ProbeTask(CohortTask):
    """The measurements of checks S10 and S13.

    Attributes:
        attack: the attack that is checked.
        max_samples: test images per client; None: all.
        first: position of the first one.
    """

    attack: AttackSpec
    max_samples: int | None = None
    first: int = 0

    stage: ClassVar[str] = "probe"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[EvaluateOutcome]:
        """See `CohortTask`."""
        collected = _Collector(len(self.clients))
        for first, pieces, images in windows(worker, self):
            draws = split_draws(worker.config.seed, "probe", self.clients, pieces, first).to(worker.device)
            measured = gradient_health(worker.model, params, images, self.attack, draws)
            measured |= binarization_test(worker.model, params, images, self.attack, draws)
            for name, values in measured.items():
                collected.add(f"probe/{name}", values, images)
        return collected.outcomes()


@dataclass(frozen=True)
class CertifyTask(CohortTask):
    """Randomised smoothing.

    Attributes:
        sigma: standard deviation of the noise.
        num_draws: noisy copies of every image.
        max_samples: test images per client; None: all.
        first: position of the first one.
    """

    sigma: float
    num_draws: int = 1000
    max_samples: int | None = None
    first: int = 0

    stage: ClassVar[str] = "certify"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[EvaluateOutcome]:
        """See `CohortTask`."""
        collected = _Collector(len(self.clients))
        for first, pieces, images in windows(worker, self):
            draws = split_draws(worker.config.seed, "smoothing", self.clients, pieces, first).to(worker.device)
            guess, hits = votes(worker.model, params, images, self.sigma, self.num_draws, draws)
            collected.add("votes/guess", guess, images)
            collected.add("votes/hits", hits, images)
        return collected.outcomes()


Measurement = EvaluateTask | TransferTask | ProbeTask | CertifyTask


def windows(worker: CohortWorker, task: Measurement) -> Iterator[tuple[int, list[Split], ClientImages]]:
    """Yield the test images of a task in flat batches of at most `EVALUATION_ROWS`, and of what fits the memory.

    Yields:
        The position of the first image of every client, the splits that contain just these images, and the same as
        tensors.
    """
    tests = [worker.fleet.client(client).test for client in task.clients]
    rows = max(1, min(EVALUATION_ROWS, worker.model.windows.of("evaluate")) // len(tests))
    longest = max(len(test) for test in tests)
    end = longest if task.max_samples is None else min(longest, task.first + task.max_samples)
    with worker.stopwatch("evaluate"):
        for first in range(task.first, end, rows):
            window = slice(first, min(first + rows, end))
            pieces = [Split(test.images[window], test.labels[window]) for test in tests]
            yield first, pieces, client_images(pieces, torch.float32, worker.device)


class _Collector:
    """Collects the values of the clients of a cohort, batch by batch."""

    def __init__(self, num_clients: int) -> None:
        self._values: list[dict[str, list[np.ndarray]]] = [{} for _ in range(num_clients)]
        self._passes: dict[str, tuple[int, int]] = {}

    def add(self, name: str, values: torch.Tensor, images: ClientImages) -> None:
        """Add the values ``[N, ...]`` of a flat batch to those of the clients."""
        for values_by_name, client_values in zip(self._values, images.split_by_client(values), strict=True):
            values_by_name.setdefault(name, []).append(client_values)

    def count(self, attack: str, forwards: int, backwards: int) -> None:
        """Add to the passes of an attack."""
        before = self._passes.get(attack, (0, 0))
        self._passes[attack] = (before[0] + forwards, before[1] + backwards)

    def outcomes(self) -> list[EvaluateOutcome]:
        """Return the outcome of every client, its batches concatenated."""
        joined = [{name: np.concatenate(windows) for name, windows in by_name.items()} for by_name in self._values]
        return [EvaluateOutcome(values, self._passes) for values in joined]

"""What every part of the proof works with: a device, clients with made-up images, experiments, and clocks.

Nothing here reads a data set or the network, and neither Ray nor MLflow is imported on the way.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.types import ClientState, Split, StateStack, stack_states
from sylva_ray.data.datasets import Dataset
from sylva_ray.data.fleet import ClientIndices, FleetData
from sylva_ray.federation.client.measuring import EvaluateTask
from sylva_ray.federation.client.training import TrainSettings, TrainTask
from sylva_ray.federation.client.worker import AUXILIARY, CohortWorker, cohort_model
from sylva_ray.models.backbone import backbone_arrays, create_backbone
from sylva_ray.preparation.experiment import create_worker, initial_states
from sylva_ray.preparation.resolve import resolve_config

Line = dict[str, Any]
"""A line of the proof. ``item`` names it; ``holds`` is whether a criterion that decides is met, None: not judged."""

NUM_CLASSES = 10
RAGGED = (13, 1, 6)
"""Training images of three clients, one of which has a single one."""


@dataclass(frozen=True)
class Experiment:
    """A worker, and the states that its clients start from.

    Attributes:
        worker: on the device.
        states: of the K clients.
    """

    worker: CohortWorker
    states: Sequence[ClientState]

    def stack(self, clients: Sequence[int]) -> StateStack:
        """Return the states of some clients, stacked."""
        return stack_states([self.states[client] for client in clients])

    def with_own_labels(self) -> Experiment:
        """Return the experiment with the clients' predictions as labels of their test images.

        No image is misclassified before it is attacked, so an attack has something to do.
        """
        worker, fleet = self.worker, self.worker.fleet
        labels = fleet.dataset.test.labels.copy()
        clients = tuple(range(len(self.states)))
        measured = worker.run(EvaluateTask(0, clients, self.stack(clients))).outcomes
        for client, outcome in zip(clients, measured, strict=True):
            labels[fleet.clients[client].test] = outcome.predictions["benign"]
        worker.fleet = replace(fleet, dataset=replace(fleet.dataset, test=Split(fleet.dataset.test.images, labels)))
        return self

    def train_task(self, clients: Sequence[int] | None = None, **settings: Any) -> TrainTask:
        """Return local training of some clients (None: all); ``settings`` are those of `TrainSettings`."""
        chosen = tuple(range(len(self.states)) if clients is None else clients)
        return TrainTask(1, chosen, self.stack(chosen), TrainSettings(**{"epsilon": 4 / 255, "lr": 0.005} | settings))

    def trained(self, clients: Sequence[int] | None = None, **settings: Any) -> list[ClientState]:
        """Return the states after local training on the worker."""
        outcomes = self.worker.run(self.train_task(clients, **settings)).outcomes
        return [outcome.state for outcome in outcomes]


@dataclass(frozen=True)
class Lab:
    """Where the proof runs.

    Attributes:
        device: ``cpu`` or ``cuda``.
        reduced: whether sizes are those that one CPU core can do in a minute.
    """

    device: str
    reduced: bool

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def experiment(
        self,
        counts: Sequence[int] = RAGGED,
        sections: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        image_size: int = 32,
        held_out: int = 6,
        device: str | None = None,
    ) -> Experiment:
        """Build an experiment on made-up images.

        Args:
            counts: training images of every client.
            sections: settings that differ from `base_config`, by section.
            image_size: side of the images in pixels.
            held_out: images in each of the other splits of every client.
            device: another one than the lab's.
        """
        config = build(ExperimentConfig, base_config(len(counts), device or self.device, sections or {}))
        resolved = resolve_config(config)
        algorithm = create_algorithm(resolved.algorithm)
        backbone = create_backbone(resolved.backbone, NUM_CLASSES)
        arrays = {name: np.array(value) for name, value in backbone_arrays(backbone).items()}
        arrays |= {AUXILIARY + name: value for name, value in algorithm.auxiliary_weights(NUM_CLASSES).items()}
        model = cohort_model(algorithm, resolved, backbone)
        states = initial_states(algorithm, model, resolved, NUM_CLASSES, arrays)
        return Experiment(create_worker(resolved, made_up_fleet(counts, held_out, image_size), arrays), states)

    def synchronise(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the wall seconds of some work, with what it left running on the device."""
        self.synchronise()
        started = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - started

    def best(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Return the seconds of the fastest of ``repeats`` runs, after one to warm up."""
        return min([self.seconds(work) for _ in range(1 + repeats)][1:])


def base_config(num_clients: int, device: str, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of a small experiment, changed by ``sections``."""
    base: dict[str, dict[str, Any]] = {
        "algorithm": {"name": "sylva"},
        "partition": {"num_clients": num_clients},
        "lora": {"rank": 4},
        "attack": {"epsilon": "4/255", "steps": 2},
        "training": {
            **{"rounds": 1, "batch_size": 8, "lr": 0.005, "cohort_size": num_clients},
            **{"precision": "float32", "attention": "fused", "device": device},
        },
        "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 2}], "precision": "float32"},
        "cluster": {"pool": "in_process"},
        "tracking": {"enabled": False},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}


def made_up_fleet(counts: Sequence[int], held_out: int, image_size: int) -> FleetData:
    """Return clients with ``counts`` training images each, and ``held_out`` in each of the other splits.

    An image is a coarse pattern of its class under noise, so that a few steps learn something that an attack can break.
    """
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(NUM_CLASSES, 3, 4, 4))
    num_train = sum(counts) + 2 * held_out * len(counts)

    def split(count: int) -> Split:
        labels = np.arange(count) % NUM_CLASSES
        cell = -(-image_size // 4)
        pattern = np.kron(coarse[labels], np.ones((cell, cell)))[:, :, :image_size, :image_size]
        noise = rng.standard_normal(pattern.shape, dtype=np.float32)
        return Split(np.clip(128 + 10 * pattern + 20 * noise, 0, 255).astype(np.uint8), labels.astype(np.int64))

    train, test = split(num_train), split(held_out * len(counts))
    free, clients = iter(range(num_train)), []
    for client, count in enumerate(counts):
        own, selection, guard = (np.array([next(free) for _ in range(n)]) for n in (count, held_out, held_out))
        clients.append(ClientIndices(own, selection, guard, np.arange(client * held_out, (client + 1) * held_out)))
    return FleetData(Dataset("made up", train, test, tuple(map(str, range(NUM_CLASSES)))), tuple(clients))


def computing_in(precision: str) -> dict[str, dict[str, str]]:
    """Return the sections that set the precision of training and of evaluation."""
    return {"training": {"precision": precision}, "evaluation": {"precision": precision}}


def attempt(item: str, work: Callable[[], Line]) -> Iterator[Line]:
    """Yield the line of ``work``, whose criterion is that it ends without an error, or the line of its error."""
    started = time.perf_counter()
    try:
        line = {"holds": True, **work()}
    except Exception as error:  # the proof is about which errors there are
        line = {"holds": False, "error": error_text(error)}
    yield {"item": item, "seconds": round(time.perf_counter() - started, 2), **line}


def error_text(error: BaseException) -> str:
    """Return an error and the three innermost places where it was raised, in one line."""
    places = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({' < '.join(places[:-4:-1])})"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to that of ``expected``, in float64."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).norm() / b.norm())

"""The tiny experiment of `tests.conftest` on the session's Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.federation.client.training import TrainSettings, TrainTask
from sylva_ray.federation.observer import Notice, Observer
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.preparation.experiment import Prepared

SECTION = {"pool": "ray", "num_actors": 2, "cpus_per_actor": 0.5, "max_task_retries": 1}
"""Half a CPU each, so that a second pool finds room beside the one that the module keeps."""


class Notices(Observer):
    """Keeps what a person would read; not how long a busy machine takes to start an actor."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_notice(self, notice: Notice) -> None:
        """Keep it."""
        if not notice.text.startswith("waiting for"):
            self.texts.append(notice.text)


@pytest.fixture(scope="session")
def on_ray(tiny: Prepared) -> Prepared:
    """`tiny`, to be run on Ray."""
    cluster = tiny.config.cluster.model_copy(update=SECTION)
    return dataclasses.replace(tiny, config=tiny.config.model_copy(update={"cluster": cluster}))


@pytest.fixture(scope="session")
def train_task(tiny: Prepared) -> Callable[..., CohortTask]:
    """``(clients, epochs) -> TrainTask`` from the state that every client starts from."""
    from sylva_ray.core.seeding import generator
    from sylva_ray.core.types import stack_states
    from sylva_ray.federation.client.worker import build_model

    model = build_model(create_algorithm(tiny.config.algorithm), tiny.config, tiny.fleet.num_classes, tiny.backbone)
    initial = model.initial_state(generator(tiny.config.seed, "initial state"))

    def make(clients: tuple[int, ...], epochs: int = 1) -> CohortTask:
        states = stack_states([initial] * len(clients))
        return TrainTask(1, clients, states, TrainSettings(epsilon=4 / 255, lr=0.005, epochs=epochs))

    return make


def adapter_files(run_dir: Path) -> dict[str, bytes]:
    """Name and content of everything that a run exported."""
    root = run_dir / "adapters"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

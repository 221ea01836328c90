"""Small closed worlds for methods: softmax regressions as a context, a fleet of LoRA states, one real round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import AlgorithmSection, ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.seeding import ImageDraws, generator
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import AttackSpec, ClientState, ParameterStack, stack_states
from sylva_ray.federation.client.training import TrainSettings, TrainTask
from sylva_ray.federation.client.worker import CohortWorker, Task
from sylva_ray.federation.context import Batch, ClientContext, RoundUploads
from sylva_ray.federation.method import Method
from sylva_ray.models.cohort import select_clients
from sylva_ray.preparation.experiment import Prepared, create_worker, prepare
from tests.conftest import TINY
from tests.fake_model import FakeModel

NOTHING = AttackSpec("pgd", 0.0, 3, 0.0)
SMALL = AttackSpec("pgd", 0.05, 5, 0.02)
FEW_IMAGES = {
    "dataset": {"name": "digits", "max_train": 120, "max_test": 40},
    "partition": {"num_clients": 3, "alpha": 0.5, "min_samples": 10, "test_samples": 4},
}
HEADS = ("head.weight", "head.bias")


class SoftmaxModel(FakeModel):
    """Three-class softmax regressions, one per client."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nd,ncd->nc", x.flatten(1), params["w"][owner]) + params["b"][owner]


def toy(
    owned: Sequence[int] = (5, 7), seed: int = 0, counts: Sequence[Sequence[int]] = ((4, 1, 0), (2, 2, 3))
) -> tuple[ClientContext, dict[str, torch.Tensor], Batch]:
    """Clients with ``owned`` images each; what they received is not where they are."""
    g = torch.Generator().manual_seed(seed)
    size, clients = sum(owned), len(owned)
    owner = torch.repeat_interleave(torch.arange(clients), torch.tensor(owned))
    params = {"w": torch.randn(clients, 3, 48, generator=g), "b": torch.randn(clients, 3, generator=g)}
    received = {name: value + 0.1 * torch.randn(value.shape, generator=g) for name, value in params.items()}
    batch = Batch(
        torch.rand(size, 3, 4, 4, generator=g),
        torch.randint(0, 3, (size,), generator=g),
        owner,
        clients,
        torch.tensor([n > 0 for n in owned]),
        ImageDraws(torch.arange(size) + 1000 * seed),
    )
    return ClientContext(SoftmaxModel(), torch.tensor(counts), received, Stopwatch()), params, batch


def alone(
    context: ClientContext, params: ParameterStack, batch: Batch, client: int
) -> tuple[ClientContext, dict[str, torch.Tensor], Batch]:
    """One client of a cohort as a cohort of its own."""
    own = batch.owner == client
    only = Batch(
        batch.x[own],
        batch.y[own],
        torch.zeros(int(own.sum()), dtype=torch.long),
        1,
        batch.active[client : client + 1],
        batch.draws.select(own),
    )
    received = select_clients(context.received, [client])
    apart = ClientContext(context.model, context.class_counts[client : client + 1], received, Stopwatch())
    return apart, select_clients(params, [client]), only


def method(name: str, **parameters: Any) -> Any:
    """A registered method, of a type of its own, that knows the heads of the fleet."""
    made = create_algorithm(AlgorithmSection(name=name, **parameters))
    made.head_names = HEADS
    return made


def fleet(count: int, seed: int = 0, rank: int = 2) -> list[dict[str, np.ndarray]]:
    """Random client states: two adapted modules and a head."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        f"{m}.lora_{f}": s for m in "mn" for f, s in (("A", (rank, 6)), ("B", (5, rank)))
    }
    shapes |= {"head.weight": (3, 4), "head.bias": (3,)}
    return [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(count)]


def arrive(
    made: Method,
    states: Sequence[ClientState],
    clients: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    round: int = 3,
    losses: Sequence[float] | None = None,
    received: Sequence[ClientState] | None = None,
) -> RoundUploads:
    """The uploads of ``clients`` (None: all), packed and unpacked as on the wire."""
    chosen = range(len(states)) if clients is None else clients
    uploads = {c: made.unpack(c, made.pack(c, states[c])) for c in chosen}
    sizes = sizes or [10] * len(states)
    metrics = {c: {"loss": loss} for c, loss in enumerate(losses or [1.0] * len(states))}
    return RoundUploads(round, states, received or states, uploads, sizes, metrics)


def equal(a: ClientState, b: ClientState) -> bool:
    """Same names, same bits."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def tiny_experiment(name: str, algorithm: dict[str, Any] | None = None, **sections: Any) -> Prepared:
    """`TINY` with another method; what is not asked for stays small."""
    raw = TINY | {"algorithm": {"name": name} | (algorithm or {}), "lora": {"rank": 4}} | FEW_IMAGES | sections
    return prepare(build(ExperimentConfig, raw))


def tiny_worker(prepared: Prepared) -> CohortWorker:
    return create_worker(prepared.config, prepared.fleet, prepared.backbone)


def starting_states(worker: CohortWorker) -> list[dict[str, np.ndarray]]:
    common = worker.model.initial_state(generator(worker.config.seed, "initial state"))
    return [worker.algorithm.initial_state(c, common) for c in range(worker.config.partition.num_clients)]


def trained(
    worker: CohortWorker,
    states: Sequence[ClientState],
    epochs: int = 1,
    head_epochs: int = 0,
    lr: float = 0.01,
    epsilon: float = 4 / 255,
    clients: Sequence[int] | None = None,
    round: int = 1,
) -> list[dict[str, np.ndarray]]:
    """The states of ``clients`` (None: all) after a round of real local training."""
    chosen = tuple(range(len(states)) if clients is None else clients)
    stack = stack_states([states[c] for c in chosen])
    result = worker.run(TrainTask(round, chosen, stack, TrainSettings(epsilon, lr, epochs, head_epochs)))
    return [dict(outcome.state) for outcome in result.outcomes]


def watch(
    worker: CohortWorker, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[ClientContext], list[tuple[Batch, torch.Tensor]]]:
    """The contexts that a worker makes and the images that it crafts; crafting may change no parameter."""
    contexts: list[ClientContext] = []
    crafted: list[tuple[Batch, torch.Tensor]] = []
    craft, context_of = worker.algorithm.craft, worker.context

    def spied_craft(context: ClientContext, params: ParameterStack, batch: Batch, attack: AttackSpec) -> torch.Tensor:
        before = {name: value.clone() for name, value in params.items()}
        crafted.append((batch, craft(context, params, batch, attack)))
        assert all(torch.equal(before[name], params[name]) for name in params), "crafting changed the model"
        return crafted[-1][1]

    def spied_context(task: Task, params: ParameterStack) -> ClientContext:
        contexts.append(context_of(task, params))
        return contexts[-1]

    monkeypatch.setattr(worker.algorithm, "craft", spied_craft)
    monkeypatch.setattr(worker, "context", spied_context)
    return contexts, crafted


def moved(before: ClientState, after: ClientState) -> set[str]:
    """Names whose value changed."""
    return {name for name in before if not np.array_equal(before[name], after[name])}

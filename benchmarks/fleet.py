"""Measure what a round costs the coordinator of a large fleet, and the memory that it needs, without training.

    python benchmarks/fleet.py [--clients 1000 10000] [--per-round 100] [--rounds 8] [--backbone vit_micro] [--all]

Clients have adapters of the shapes of a backbone (rank 8, qkv and proj of every block) and a head of ten classes. In
place of training, a pool returns the states it was sent, moved a little. Everything else is a run's: participants,
uploads, neighbours and merges (``adapters=neighbours``), states, checkpoints, records. With ``--all`` every client is
picked once first, so that all states differ and lie on the disk.

Columns: CPU and wall seconds of a round (medians, the first two rounds left out), megabytes that a checkpoint writes,
anonymous memory of the process (what is not a page of a file, which the system can drop), and what a resume takes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.types import Split, unstack_states
from sylva_ray.data.datasets import Dataset
from sylva_ray.data.fleet import ClientIndices, FleetData
from sylva_ray.federation.client.training import TrainOutcome, TrainSettings
from sylva_ray.federation.client.worker import CohortResult
from sylva_ray.federation.loop import Rounds
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.pool import OnDone
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.federated_round import FederatedRound
from sylva_ray.federation.stages.stage import Stage, StageResult
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.preparation.resolve import resolve_config
from sylva_ray.storage.run_folder import RunFolder

SHAPES = {"vit_micro": (192, 6), "vit_base": (768, 12)}
"""Width and blocks."""


class Moved:
    """A pool whose tasks return the states that they were sent, moved in a direction of each client's own."""

    num_actors = 1

    def __init__(self) -> None:
        self._draws = np.random.default_rng(0).normal(scale=0.01, size=2**22).astype(np.float32)

    def run(
        self,
        tasks: Sequence[CohortTask],
        deadline_s: float | None = None,
        on_done: OnDone | None = None,
        shared: object = None,
    ) -> list[CohortResult[Any] | None]:
        """Return the results."""
        del deadline_s, on_done, shared
        trained = ((t.clients, map(self._outcome, t.clients, unstack_states(t.states))) for t in tasks)
        return [CohortResult(clients, tuple(outcomes), {}, 0) for clients, outcomes in trained]

    def _outcome(self, client: int, state: dict[str, np.ndarray]) -> TrainOutcome:
        for index, array in enumerate(state.values()):
            first = (7919 * client + 104729 * index) % (len(self._draws) - array.size)
            array += self._draws[first : first + array.size].reshape(array.shape)
        return TrainOutcome(state, 20, {"loss": 1.0})

    def reduce_windows(self, windows: Mapping[str, int]) -> None:
        """Do nothing: nothing is computed."""

    def close(self) -> None:
        """Do nothing."""


class Visit(Stage):
    """Training of given clients, without an exchange."""

    name, title, evaluated = "visit", "visit", "never"

    def __init__(self, clients: Sequence[int]) -> None:
        self.clients = clients

    def run(self, server: Server, step: int) -> StageResult:
        """See `Stage.run`."""
        outcomes, _ = server.train(step, self.clients, TrainSettings(0.1, 0.1))
        server.adopt_states(outcomes)
        return StageResult(participants=self.clients)


def synthetic_fleet(num_clients: int) -> FleetData:
    """Return a fleet whose clients share twenty images."""
    images = Split(np.zeros((20, 3, 2, 2), np.uint8), np.arange(20) % 10)
    one = ClientIndices(*[np.arange(20)] * 4)
    return FleetData(Dataset("synthetic", images, images, tuple("0123456789")), (one,) * num_clients)


def initial_state(backbone: str) -> dict[str, np.ndarray]:
    """Return the state that all clients start from; B is zero."""
    (width, blocks), rng = SHAPES[backbone], np.random.default_rng(0)
    state = {"head.weight": np.zeros((10, width)), "head.bias": np.zeros(10)}
    for block in range(blocks):
        for module, d_out in (("attn.proj", width), ("attn.qkv", 3 * width)):
            state[f"blocks.{block}.{module}.lora_A"] = rng.uniform(-1, 1, size=(8, width)) / np.sqrt(width)
            state[f"blocks.{block}.{module}.lora_B"] = np.zeros((d_out, 8))
    return {name: value.astype(np.float32) for name, value in state.items()}


def anonymous_bytes() -> int:
    """Return the resident memory of this process that is not a page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(num_clients: int, per_round: int, rounds: int, backbone: str, visits_all: bool, root: Path) -> str:
    """Run and return a row of the table."""
    partition = {"num_clients": num_clients}
    training = {"clients_per_round": per_round, "rounds": rounds + 1, "device": "cpu"}
    sections = {"partition": partition, "training": training, "evaluation": {"attacks": []}}
    algorithm = {"name": "fedavg_at", "adapters": "neighbours", "heads": "local", "model": "lora"}
    config = resolve_config(build(ExperimentConfig, sections | {"algorithm": algorithm}))
    method = create_algorithm(config.algorithm)
    method.head_names = ("head.weight", "head.bias")
    state = initial_state(backbone)
    folder = RunFolder(root / f"{num_clients}")
    server = Server(
        config, method, synthetic_fleet(num_clients), [state] * num_clients, {}, Moved(), folder, Observer()
    )
    picked = range(0, num_clients, per_round) if visits_all else ()
    visits = [Visit(range(first, min(first + per_round, num_clients))) for first in picked]
    stages = [*visits, *(FederatedRound(number, rounds + 1) for number in range(1, rounds + 2))]
    loop, costs, peak = Rounds(server, stages), [], 0
    for index in range(len(stages) - 1):  # the last one would be evaluated
        cpu, wall = time.process_time(), time.perf_counter()
        loop.run_stage(index)
        written = (folder.checkpoints.root / f"round_{index:04d}" / "states.safetensors").stat().st_size
        costs.append((time.process_time() - cpu, time.perf_counter() - wall, written / 1e6))
        peak = max(peak, anonymous_bytes())
    cpu, wall, written = (statistics.median(column) for column in zip(*costs[len(visits) + 2 :], strict=True))
    started = time.perf_counter()
    RunFolder(folder.path).checkpoints.latest()
    resume = time.perf_counter() - started
    return f"| {num_clients} | {cpu:.2f} | {wall:.2f} | {written:.0f} | {peak / 2**30:.2f} | {resume:.1f} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--per-round", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=8, help="at least 3")
    parser.add_argument("--backbone", choices=SHAPES, default="vit_micro")
    parser.add_argument("--all", action="store_true", help="pick every client once before the rounds")
    given = parser.parse_args()
    print("| clients | CPU s | wall s | written, MB | anonymous memory, GiB | resume, s |\n|---|---|---|---|---|---|")
    for num_clients in given.clients:
        with tempfile.TemporaryDirectory() as root, threadpool_limits(limits=1, user_api="blas"):
            row = measure(num_clients, given.per_round, given.rounds, given.backbone, given.all, Path(root))
            print(row, flush=True)


if __name__ == "__main__":
    main()

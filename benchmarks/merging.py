"""Measure how long the coordinator takes to merge a round's uploads, without training and Ray, on one BLAS thread.

    python benchmarks/merging.py [--clients 10 100 300] [--repeats 3]

Uploads have the shapes of the backbone `vit_micro` (6 blocks of width 192, qkv and proj of every block adapted, rank
8). In *moved* fleets, every client has moved away from a common state, as after a round of
training. In *unrelated* fleets, the clients have nothing in common: the singular values of a mean of products then fall
slowly, which is the worst case. The numbers are CPU seconds of `Algorithm.aggregate`, the lowest of the repeats:

* neighbours: ``adapters=neighbours`` in round 2: every client is merged with its ceil(sqrt K) nearest;
* round 1: the same method in round 1, in which all clients are merged with all others;
* global: ``adapters=global``, by product-SVD.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from sylva_ray.federation.context import RoundUploads
from sylva_ray.federation.contract import Algorithm

WIDTH, BLOCKS, RANK = 192, 6, 8


def fleet_states(kind: str, num_clients: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Draw the adapters of K clients, ``lora_A [8, 192]`` and ``lora_B [192 or 576, 8]``."""
    rng = np.random.default_rng(seed)
    states: list[dict[str, np.ndarray]] = [{} for _ in range(num_clients)]
    for block in range(BLOCKS):
        for module, d_out in (("attn.proj", WIDTH), ("attn.qkv", 3 * WIDTH)):
            a, b = _orthonormal(rng, WIDTH).T / np.sqrt(3), _orthonormal(rng, d_out) * np.linspace(1, 0.15, RANK)
            for state in states:
                own_a, own_b = 0.01 * rng.normal(size=a.shape), 0.03 * rng.normal(size=b.shape)
                factors = (a + own_a, b + own_b) if kind == "moved" else (own_a, own_b)
                for letter, factor in zip("AB", factors, strict=True):
                    state[f"blocks.{block}.{module}.lora_{letter}"] = factor.astype(np.float32)
    return states


def min_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the lowest CPU time of several calls; a busy machine disturbs it little."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def seconds_of(states: list[dict[str, np.ndarray]], repeats: int) -> tuple[float, float, float]:
    """Measure neighbours, round 1 and global."""
    uploads, sizes = dict(enumerate(states)), [10 + client % 7 for client in range(len(states))]
    first, second = (RoundUploads(round, states, states, uploads, sizes) for round in (1, 2))
    neighbours, everyone = (Algorithm(Algorithm.Parameters(adapters=sharing)) for sharing in ("neighbours", "global"))
    return (
        min_seconds(lambda: neighbours.aggregate(second), repeats),
        min_seconds(lambda: neighbours.aggregate(first), repeats),
        min_seconds(lambda: everyone.aggregate(second), repeats),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 300])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| fleet | K | neighbours, s | round 1, s | global, s |\n|---|---|---|---|---|")
    with threadpool_limits(limits=1, user_api="blas"):
        for kind in ("moved", "unrelated"):
            for num_clients in options.clients:
                row = seconds_of(fleet_states(kind, num_clients), options.repeats)
                print(f"| {kind} | {num_clients} | " + " | ".join(f"{s:.3f}" for s in row) + " |", flush=True)


def _orthonormal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, RANK)))[0]


if __name__ == "__main__":
    main()

"""Measure how long the coordinator takes to merge a round's uploads, without training and Ray, on one BLAS thread.

    python benchmarks/merging.py [--clients 10 100 300] [--fleets moved groups unrelated] [--repeats 3] [--recall]
    python benchmarks/merging.py --clients 10000 --fleets moved --sample 160

Uploads have the shapes of the backbone `vit_micro` (6 blocks of width 192, qkv and proj of every block adapted, rank
8). In *moved* fleets, every client has moved away from a common state, as after a round of training; in *groups*, it
has moved towards one of K / 25 centres and a little away from it. In *unrelated* fleets, the clients have nothing in
common: the singular values of a mean of products then fall slowly, which is the worst case. The numbers are CPU seconds
and, in brackets, wall seconds of `Algorithm.aggregate`, those of the repeat with the least CPU time:

* graph: the part of the next column that searches neighbours;
* neighbours: ``adapters=neighbours`` in round 2: every client is merged with its ceil(sqrt K) nearest;
* round 1: the same method in round 1, in which all clients are merged with all others;
* global: ``adapters=global``, by product-SVD;
* recall (with ``--recall``): the fraction of the exact neighbours that the search finds.

With ``--sample N``, for fleets that would take too long, only N receivers are merged, each with ceil(sqrt K) clients
drawn at random, on one thread. The row holds CPU seconds of one receiver and of what all receivers share, CPU
milliseconds of each further receiver, and the peak memory of the process in GiB.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from sylva_ray.aggregation.neighbours import nearest_clients, neighbour_graph, neighbourhood_size, product_gram
from sylva_ray.aggregation.threads import in_turn
from sylva_ray.federation.context import Merge, RoundUploads
from sylva_ray.federation.contract import Algorithm

WIDTH, BLOCKS, RANK = 192, 6, 8
FLEETS = ["moved", "groups", "unrelated"]


def fleet_states(kind: str, num_clients: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Draw the adapters of K clients, ``lora_A [8, 192]`` and ``lora_B [192 or 576, 8]``."""
    rng = np.random.default_rng(seed)
    states: list[dict[str, np.ndarray]] = [{} for _ in range(num_clients)]
    num_groups = max(1, num_clients // 25)
    for block in range(BLOCKS):
        for module, d_out in (("attn.proj", WIDTH), ("attn.qkv", 3 * WIDTH)):
            a, b = _orthonormal(rng, WIDTH).T / np.sqrt(3), _orthonormal(rng, d_out) * np.linspace(1, 0.15, RANK)
            centres = [(0.01 * _normal(rng, a), 0.03 * _normal(rng, b)) for _ in range(num_groups)]
            for client, state in enumerate(states):
                own_a, own_b = 0.01 * _normal(rng, a), 0.03 * _normal(rng, b)
                if kind == "groups":
                    centre_a, centre_b = centres[client % num_groups]
                    own_a, own_b = centre_a + 0.5 * own_a, centre_b + 0.5 * own_b
                factors = (own_a, own_b) if kind == "unrelated" else (a + own_a, b + own_b)
                for letter, factor in zip("AB", factors, strict=True):
                    state[f"blocks.{block}.{module}.lora_{letter}"] = factor.astype(np.float32)
    return states


def least(call: Callable[[], object], repeats: int) -> str:
    """Return the lowest CPU time of several calls, which a busy machine disturbs little, and its wall time."""
    times = []
    for _ in range(repeats):
        started, wall = time.process_time(), time.perf_counter()
        call()
        times.append((time.process_time() - started, time.perf_counter() - wall))
    cpu, wall = min(times)
    return f"{cpu:.2f} ({wall:.2f})"


def seconds_of(states: list[dict[str, np.ndarray]], repeats: int) -> list[str]:
    """Measure graph, neighbours, round 1 and global."""
    uploads, sizes = dict(enumerate(states)), [10 + client % 7 for client in range(len(states))]
    first, second = (RoundUploads(round, states, states, uploads, sizes) for round in (1, 2))
    neighbours, everyone = (Algorithm(Algorithm.Parameters(adapters=sharing)) for sharing in ("neighbours", "global"))
    return [
        least(lambda: nearest_clients(states, np.array(sizes)), repeats),
        least(lambda: neighbours.aggregate(second), repeats),
        least(lambda: neighbours.aggregate(first), repeats),
        least(lambda: everyone.aggregate(second), repeats),
    ]


def sampled(states: list[dict[str, np.ndarray]], count: int) -> list[str]:
    """Measure the merges of ``count`` receivers with random neighbours."""
    size, rng = len(states), np.random.default_rng(0)
    uploads = RoundUploads(2, states, states, dict(enumerate(states)), [1] * size)
    method, num_neighbours = Algorithm(Algorithm.Parameters(adapters="neighbours")), neighbourhood_size(size)
    merges = []
    for receiver in range(count):
        others = rng.choice(np.delete(np.arange(size), receiver), num_neighbours - 1, replace=False)
        members = sorted([receiver, *others.tolist()])
        merges.append(Merge(members, np.full(num_neighbours, 1 / num_neighbours), receiver))
    times = []
    for some in (merges[:1], merges):
        started = time.process_time()
        method.merge_here(uploads, list(states[0]), some, in_turn)
        times.append(time.process_time() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [f"{times[0]:.2f}", f"{1000 * (times[1] - times[0]) / (count - 1):.1f}", f"{memory:.2f}"]


def recall(states: list[dict[str, np.ndarray]]) -> str:
    """Return the fraction of the exact neighbours that are found; the exact search takes O(K^2) products."""
    same = np.ones(len(states))
    found, exact = nearest_clients(states, same).members, neighbour_graph(product_gram(states), same).members
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True))
    return f"{hits / exact.size:.3f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 300])
    parser.add_argument("--fleets", nargs="+", choices=FLEETS, default=FLEETS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recall", action="store_true")
    parser.add_argument("--sample", type=int)
    options = parser.parse_args()
    columns = (
        ["shared, s", "per receiver, ms", "memory, GiB"]
        if options.sample
        else ["graph, s", "neighbours, s", "round 1, s", "global, s", *["recall"] * options.recall]
    )
    print(f"| fleet | K | {' | '.join(columns)} |\n|---|---{'|---' * len(columns)}|")
    with threadpool_limits(limits=1, user_api="blas"):
        for kind in options.fleets:
            for num_clients in options.clients:
                states = fleet_states(kind, num_clients)
                if options.sample:
                    row = sampled(states, options.sample)
                else:
                    row = seconds_of(states, options.repeats) + ([recall(states)] if options.recall else [])
                print(f"| {kind} | {num_clients} | {' | '.join(row)} |", flush=True)


def _normal(rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
    return rng.normal(size=like.shape)


def _orthonormal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, RANK)))[0]


if __name__ == "__main__":
    main()

"""The coordinator plays phase 2's layer game.

    clients ── values of coalitions [m, 2] ──►  Shapley values, shrunk towards the neighbourhood
            ◄─ candidate selections ─────────   the nested sets on the lambda path
            ── paired guard outcomes ────────►  the largest selection whose robust loss is bounded
            ◄─ selected layers ──────────────
            ── guard outcomes per epoch ─────►  the last refinement epoch that passes the same guard

Only these numbers travel: no image, no weight. (The simulator moves states too, because any worker may run any client.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.client import GuardOutcome
from sylva_ray.federation.stages.layer_game.selection import images_needed, paired_upper_bound


@dataclass(frozen=True)
class Verdict:
    """What the guard decided for one client: the accepted row of its candidates, the images pooled, the bound it met."""

    row: int
    pooled_images: int
    bound: float


def largest_accepted(
    client: int,
    outcomes: Mapping[int, GuardOutcome],
    has_row: Callable[[int, int], bool],
    graph: NeighbourGraph,
    phase2: Phase2Parameters,
) -> Verdict:
    """How far the rows can be walked while the pooled, one-sided paired bound on the robust loss stays within the tolerance.

    A row is a candidate selection, or an epoch of refinement; row 0 costs nothing. The walk ends at the first row that fails,
    so however many rows there are, the chance of accepting a harmful one stays that of a single test (a fixed sequence,
    Maurer et al. 1995). The client's own guard images decide where there are ``guard_pool`` of them (`images_needed`, if None);
    else the nearest neighbours' outcomes *at the same row* are added, where ``has_row(neighbour, row)`` says that they have one.
    Neighbours differ, so a pool larger than needed would refuse to one client what harms another.
    """
    wanted = phase2.guard_pool or images_needed(phase2.guard_tolerance, phase2.guard_confidence)
    near = graph.members[client][np.argsort(-graph.weights[client], kind="stable")]
    others = [int(neighbour) for neighbour in near if neighbour != client]
    accepted = Verdict(0, 0, 0.0)
    for row in range(1, len(outcomes[client].lost)):
        if not has_row(client, row):
            continue
        pool = [outcomes[client]]
        for neighbour in others:
            if sum(o.num_samples for o in pool) >= wanted:
                break
            if has_row(neighbour, row):
                pool.append(outcomes[neighbour])
        images = sum(o.num_samples for o in pool)
        lost, gained = sum(int(o.lost[row]) for o in pool), sum(int(o.gained[row]) for o in pool)
        bound = paired_upper_bound(lost, gained, images, phase2.guard_confidence)
        if bound > phase2.guard_tolerance:
            break
        accepted = Verdict(row, images, bound)
    return accepted


def select_layers(
    candidates: np.ndarray, outcomes: Sequence[GuardOutcome], graph: NeighbourGraph, phase2: Phase2Parameters
) -> tuple[np.ndarray, list[Verdict]]:
    """``selected [K, n] bool`` and the verdicts, from ``candidates [K, m, n]`` and all clients' guard outcomes."""

    def is_new(client: int, row: int) -> bool:
        return bool((candidates[client, row] != candidates[client, row - 1]).any())

    by_client = dict(enumerate(outcomes))
    verdicts = [largest_accepted(client, by_client, is_new, graph, phase2) for client in by_client]
    return np.stack([candidates[c, verdict.row] for c, verdict in enumerate(verdicts)]), verdicts

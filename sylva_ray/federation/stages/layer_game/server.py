"""The coordinator half of phase 2.

    clients ── values of coalitions [m, 2] ──►  Shapley values, shrunk towards the neighbourhood
            ◄─ candidate selections ─────────   the nested sets on the lambda path
            ── paired guard outcomes ────────►  the largest selection whose robust loss is bounded
            ◄─ selected layers ──────────────
            ── guard outcomes per epoch ─────►  the last refinement epoch that passes the same guard

Only these numbers are uploaded, neither images nor weights. (The simulator also moves states, because any worker may
run any client.)
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
    """What the guard decided for one client.

    Attributes:
        row: the accepted row of its candidates.
        pooled_images: guard images that the decision is based on.
        bound: the upper bound of the robust loss.
    """

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
    """Return the last row, tested in order, whose one-sided paired bound of the robust loss is within the tolerance.

    A row is a candidate selection, or an epoch of refinement; row 0 is theta^r. The tests end at the first row that
    fails, so for any number of rows the probability of accepting a harmful one is that of a single test (fixed-sequence
    testing, Maurer et al. 1995). If the client has fewer guard images than are needed, outcomes of its nearest
    neighbours *at the same row* are added, no more than necessary: neighbours differ, and what harms one need not harm
    another.

    Args:
        client: to decide for.
        outcomes: ``{client: outcome}``.
        has_row: tells whether a client has an outcome of its own at a row.
        graph: the neighbourhoods.
        phase2: tolerance, confidence and the number of images needed (`images_needed`, if ``guard_pool`` is None).
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
    """Return the selected layers ``[K, n] bool`` of all clients and the verdicts, from ``candidates [K, m, n]``."""

    def is_new(client: int, row: int) -> bool:
        return bool((candidates[client, row] != candidates[client, row - 1]).any())

    by_client = dict(enumerate(outcomes))
    verdicts = [largest_accepted(client, by_client, is_new, graph, phase2) for client in by_client]
    return np.stack([candidates[c, verdict.row] for c, verdict in enumerate(verdicts)]), verdicts

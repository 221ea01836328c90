"""The coordinator half of phase 2.

    clients ── values of coalitions [m, 2] ──►  Shapley values, shrunk towards the neighbourhood
            ◄─ candidate selections ─────────   the nested sets on the lambda path
            ── outcomes, selection split ────►  the largest set whose robust loss is bounded
            ◄─ selected layers ──────────────
            ── outcomes, guard split ────────►  the largest strength with bounded robust loss and a benign gain
            ◄─ strength ─────────────────────

Only these numbers are uploaded, neither images nor weights. (The simulator also moves states, because any worker may
run any client.) The guard split decides once, about the refined layers: what was looked at before is the selection
split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.client import PairedOutcomes
from sylva_ray.federation.stages.layer_game.selection import images_needed, paired_upper_bound


@dataclass(frozen=True)
class Verdict:
    """What was decided for one client.

    Attributes:
        row: the accepted row of its outcomes; 0: theta^r.
        pooled_images: images that the decision is based on.
        benign_bound: upper bound of the loss of benign accuracy, negative for a gain.
        robust_bound: upper bound of the loss of robust accuracy.
    """

    row: int
    pooled_images: int
    benign_bound: float
    robust_bound: float


NOTHING_KEPT = Verdict(0, 0, 0.0, 0.0)
"""The client stays at theta^r."""


def largest_accepted(
    client: int,
    outcomes: Mapping[int, PairedOutcomes],
    has_row: Callable[[int, int], bool],
    graph: NeighbourGraph,
    phase2: Phase2Parameters,
    benign_tolerance: float,
) -> Verdict:
    """Return the last row, tested in order, whose one-sided paired bounds of both losses are within the tolerances.

    A row is a candidate selection, or a strength of the refinement; row 0 is theta^r. The tests end at the first row
    that fails. For strengths, whose order is fixed beforehand, the probability of accepting a harmful one is therefore
    that of a single test (fixed-sequence testing, Maurer et al. 1995); candidates were ordered by the same images.

    If the client has fewer images than the test of the robust loss needs, outcomes of other clients *at the same row*
    are added, the nearest first and no more than necessary: clients differ, and what harms one need not harm another.
    The decision is then about the mean of the pool, and believes what its members report.

    Args:
        client: to decide for.
        outcomes: ``{client: outcomes}``.
        has_row: tells whether a client has outcomes of its own at a row.
        graph: the neighbourhoods.
        phase2: tolerance of the robust loss, confidences, and the number of images needed (`images_needed`, if
            ``guard_pool`` is None).
        benign_tolerance: of the benign loss; 0: benign accuracy must have risen; 1: it is not tested.
    """
    wanted = phase2.guard_pool or images_needed(phase2.guard_tolerance, phase2.guard_confidence)
    accepted = NOTHING_KEPT
    for row in range(1, len(outcomes[client].lost)):
        if not has_row(client, row):
            continue
        pool = [outcomes[client]]
        images = pool[0].num_samples
        for other in nearest_first(client, graph):
            if images >= wanted:
                break
            if other in outcomes and has_row(other, row):
                pool.append(outcomes[other])
                images += outcomes[other].num_samples
        lost, gained = (np.sum([getattr(o, kind)[row] for o in pool], axis=0) for kind in ("lost", "gained"))
        robust = paired_upper_bound(lost[1], gained[1], images, phase2.guard_confidence)
        benign = paired_upper_bound(lost[0], gained[0], images, phase2.benign_confidence)
        if robust > phase2.guard_tolerance or benign > benign_tolerance:
            break
        accepted = Verdict(row, images, benign, robust)
    return accepted


def nearest_first(client: int, graph: NeighbourGraph) -> Iterator[int]:
    """Yield the other clients once: neighbours by weight, then theirs, ..., and those that the walk does not reach.

    A client without neighbours shares nothing that others could be compared by, and has none.
    """
    queue, seen = [client], {client}
    for receiver in queue:
        for near in graph.members[receiver][np.argsort(-graph.weights[receiver], kind="stable")].tolist():
            if near not in seen:
                seen.add(near)
                queue.append(near)
                yield near
    if len(seen) > 1:
        yield from (other for other in range(len(graph.members)) if other not in seen)


def select_layers(
    candidates: np.ndarray, outcomes: Sequence[PairedOutcomes], graph: NeighbourGraph, phase2: Phase2Parameters
) -> np.ndarray:
    """Return the selected layers ``[K, n] bool`` of all clients from ``candidates [K, m, n]``, by robust loss alone.

    How much they gain is left to the refinement, which trains them anew.
    """

    def is_new(client: int, row: int) -> bool:
        return bool((candidates[client, row] != candidates[client, row - 1]).any())

    by_client = dict(enumerate(outcomes))
    verdicts = [largest_accepted(client, by_client, is_new, graph, phase2, benign_tolerance=1) for client in by_client]
    return np.stack([candidates[c, verdict.row] for c, verdict in enumerate(verdicts)])


def columns(verdicts: Sequence[Verdict], strengths: Sequence[float]) -> dict[str, Any]:
    """Return the fields of `GameRecord` about the refinement, from the verdicts on the strengths of every client."""
    return {
        "strength": [(0.0, *strengths)[verdict.row] for verdict in verdicts],
        "guard_images": [verdict.pooled_images for verdict in verdicts],
        "benign_bound": [verdict.benign_bound for verdict in verdicts],
        "guard_bound": [verdict.robust_bound for verdict in verdicts],
    }

"""The coordinator half of phase 2.

    clients ── values of coalitions [m, 2] ──►  Shapley values, shrunk towards the neighbourhood
            ◄─ candidate selections ─────────   the nested sets on the lambda path
            ── outcomes, selection split ────►  the largest set of them whose robust loss is bounded
            ◄─ selected layers ──────────────
            ── outcomes, guard split ────────►  the strength of the clearest benign gain, with bounded robust loss
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
        pooled_images: images that the decision is based on, or the effective number of them where they have weights.
        benign_bound: upper bound of the loss of benign accuracy, negative for a gain.
        robust_bound: upper bound of the loss of robust accuracy.
    """

    row: int
    pooled_images: int
    benign_bound: float
    robust_bound: float


NOTHING_KEPT = Verdict(0, 0, 0.0, 0.0)
"""The client stays at theta^r."""


@dataclass(frozen=True)
class _Pool:
    """Outcomes of one row, of a client and of others: images lost and gained, benign and robust (``[2]``), of all."""

    lost: np.ndarray
    gained: np.ndarray
    num_images: float

    def robust_bound(self, phase2: Phase2Parameters) -> float:
        return paired_upper_bound(self.lost[1], self.gained[1], self.num_images, phase2.guard_confidence)

    def benign_bound(self, phase2: Phase2Parameters) -> float:
        return paired_upper_bound(self.lost[0], self.gained[0], self.num_images, phase2.benign_confidence)


class Evidence:
    """Outcomes of all clients, row by row, from which a client's are taken, with others' where it has too few images.

    A row is a candidate selection, or a strength of the refinement; row 0 is theta^r. If the client has fewer images
    than the test of the robust loss needs, outcomes of other clients *at the same row* are added, the nearest first and
    no more than necessary: clients differ, and what harms one need not harm another. A decision is then about the mean
    of the pool, and believes what its members report.

    Args:
        outcomes: ``{client: outcomes}``.
        graph: the neighbourhoods.
        phase2: tolerance of the robust loss, confidences, and the number of images needed (`images_needed`, if
            ``guard_pool`` is None).
        has_row: tells whether a client has outcomes of its own at a row; None: every client has all.
    """

    def __init__(
        self,
        outcomes: Mapping[int, PairedOutcomes],
        graph: NeighbourGraph,
        phase2: Phase2Parameters,
        has_row: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.outcomes, self.graph, self.phase2 = outcomes, graph, phase2
        self.has_row = has_row or (lambda *_: True)
        self.wanted = phase2.guard_pool or images_needed(phase2.guard_tolerance, phase2.guard_confidence)

    def rows(self, client: int) -> Iterator[tuple[int, _Pool]]:
        """Yield the rows that a client has, but for row 0, and what is known of them."""
        for row in range(1, len(self.outcomes[client].lost)):
            if self.has_row(client, row):
                yield row, self._pool(client, row)

    def _pool(self, client: int, row: int) -> _Pool:
        pool = [self.outcomes[client]]
        images = pool[0].num_samples
        for other in nearest_first(client, self.graph):
            if images >= self.wanted:
                break
            if other in self.outcomes and self.has_row(other, row):
                pool.append(self.outcomes[other])
                images += self.outcomes[other].num_samples
        lost, gained = (np.sum([getattr(own, kind)[row] for own in pool], axis=0) for kind in ("lost", "gained"))
        return _Pool(lost, gained, images)


def accepted_strength(client: int, guard: Evidence) -> Verdict:
    """Return the strength with the clearest benign gain among those whose robust loss is bounded; none without a gain.

    Robust losses are tested from the weakest strength on, and the first that may exceed the tolerance ends it. The
    order is fixed beforehand, so the probability of accepting a harmful one is that of a single test (fixed-sequence
    testing, Maurer et al. 1995). Of the strengths that are left, the one with the lowest bound of the benign loss is
    kept, the strongest of equals: gains are small at weak ones, and pass into overfitting at strong ones. Looking for
    the best of several makes false gains likelier, which ``benign_confidence`` makes up for (`benchmarks/guard.py`).
    With a ``benign_tolerance`` of 1, benign accuracy does not count, and the strongest is kept.

    Args:
        client: to decide for.
        guard: outcomes of the strengths on the guard split.
    """
    phase2, best = guard.phase2, NOTHING_KEPT
    for row, pool in guard.rows(client):
        robust = pool.robust_bound(phase2)
        if robust > phase2.guard_tolerance:
            break
        benign = pool.benign_bound(phase2)
        is_best = not best.row or benign <= best.benign_bound or phase2.benign_tolerance == 1
        if is_best and benign <= phase2.benign_tolerance:
            best = Verdict(row, round(pool.num_images), benign, robust)
    return best


def select_layers(
    candidates: np.ndarray, outcomes: Sequence[PairedOutcomes], graph: NeighbourGraph, phase2: Phase2Parameters
) -> np.ndarray:
    """Return the selected layers ``[K, n] bool`` of all clients, the largest candidate whose robust loss is bounded.

    All are tried: a small candidate may fail by chance, or because a layer that was refined needs one that was not. How
    much a selection gains, and whether it stands, is left to the refinement, which is judged on other images.

    Args:
        candidates: ``[K, m, n] bool``, each within the next, row 0 empty; shorter lists repeat their last one.
        outcomes: of the candidates of every client, on the selection split.
        graph: the neighbourhoods.
        phase2: the parameters of phase 2.
    """

    def is_new(client: int, row: int) -> bool:
        return bool((candidates[client, row] != candidates[client, row - 1]).any())

    evidence = Evidence(dict(enumerate(outcomes)), graph, phase2, is_new)
    selected = np.zeros_like(candidates[:, 0])
    for client in evidence.outcomes:
        for row, pool in evidence.rows(client):
            if pool.robust_bound(phase2) <= phase2.guard_tolerance:
                selected[client] = candidates[client, row]
    return selected


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


def columns(verdicts: Sequence[Verdict], strengths: Sequence[float]) -> dict[str, Any]:
    """Return the fields of `GameRecord` about the refinement, from the verdicts on the strengths of every client."""
    return {
        "strength": [(0.0, *strengths)[verdict.row] for verdict in verdicts],
        "guard_images": [verdict.pooled_images for verdict in verdicts],
        "benign_bound": [verdict.benign_bound for verdict in verdicts],
        "guard_bound": [verdict.robust_bound for verdict in verdicts],
    }

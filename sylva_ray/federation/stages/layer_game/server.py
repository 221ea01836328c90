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
from typing import Any

import numpy as np

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.core.types import GameOutcome, GuardOutcome
from sylva_ray.federation.contract import Phase2Parameters
from sylva_ray.federation.stages.layer_game.selection import (
    images_needed,
    nested_by_score,
    nested_candidates,
    paired_upper_bound,
    shrink,
)
from sylva_ray.federation.stages.layer_game.shapley import (
    EXACT_LIMIT,
    all_coalitions,
    antithetic_permutations,
    exact_shapley,
    permutation_shapley,
    prefix_coalitions,
)


@dataclass(frozen=True)
class GamePlan:
    """Which coalitions every client evaluates; the same for all, so that they can share a stack.

    ``permutations`` is None when all 2^n coalitions are played and the Shapley values are exact."""

    coalitions: np.ndarray
    permutations: np.ndarray | None

    @staticmethod
    def of(num_players: int, phase2: Phase2Parameters, rng: np.random.Generator) -> GamePlan:
        """Exact up to `EXACT_LIMIT` players, antithetic permutation sampling beyond."""
        if num_players <= EXACT_LIMIT:
            return GamePlan(all_coalitions(num_players), None)
        permutations = antithetic_permutations(num_players, phase2.sampled_pairs, rng)
        return GamePlan(prefix_coalitions(permutations), permutations)

    def shapley(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """``values [m, 2]`` (mean true-class probability, benign and robust) -> ``phi [n, 2]`` and its half width or None.

        phi[:, 0] is the player's share of the benign gain, phi[:, 1] its share of the robust *loss* (hence the sign)."""
        payoff = values * np.array([1.0, -1.0])
        if self.permutations is None:
            return exact_shapley(payoff), None
        estimate = permutation_shapley(self.permutations, self.coalitions, payoff)
        return estimate.value, estimate.half_width


@dataclass(frozen=True)
class Verdict:
    """What the guard decided for one client: the accepted row of its candidates, the images pooled, the bound it met."""

    row: int
    pooled_images: int
    bound: float


def shapley_of_fleet(
    plan: GamePlan, outcomes: Sequence[GameOutcome], graph: NeighbourGraph, phase2: Phase2Parameters
) -> tuple[np.ndarray, np.ndarray | None]:
    """``phi [K, n, 2]`` of all clients, shrunk towards their neighbourhood's mean; half widths ``[K, n, 2]`` if sampled."""
    own = [plan.shapley(outcome.values) for outcome in outcomes]
    samples = np.array([outcome.num_samples for outcome in outcomes])
    phi = shrink(np.stack([value for value, _ in own]), graph.matrix(), samples, phase2.shrink_strength)
    widths = [width for _, width in own if width is not None]
    return phi, np.stack(widths) if widths else None


@dataclass(frozen=True)
class Ranking:
    """How the fleet's layers were ranked: ``candidates [K, m, n]``, and what they were ranked by (None: not by that).

    ``phi [K, n, 2]`` are Shapley values with ``half_width`` if sampled; ``scores [K, n]`` are gates or the like."""

    candidates: np.ndarray
    phi: np.ndarray | None = None
    half_width: np.ndarray | None = None
    scores: np.ndarray | None = None

    def record(self) -> dict[str, Any]:
        """The JSON form, for the game's record."""
        phi, width, scores = self.phi, self.half_width, self.scores
        return {
            "shapley": None if phi is None else (phi[:, :, 0] - phi[:, :, 1]).tolist(),
            "shapley_benign": None if phi is None else phi[:, :, 0].tolist(),
            "shapley_robust": None if phi is None else phi[:, :, 1].tolist(),
            "half_width": None if width is None else np.linalg.norm(width, axis=-1).tolist(),
            "scores": None if scores is None else scores.tolist(),
        }


OPEN_GATE = 0.5
"""A layer whose gate is above this is worth refining."""


def rank_layers(
    plan: GamePlan,
    outcomes: Sequence[GameOutcome],
    graph: NeighbourGraph,
    phase2: Phase2Parameters,
    rng: np.random.Generator,
) -> Ranking:
    """Every client's candidates, by the way that ``phase2.selection`` names; the last player is the head."""
    size, num_players = len(outcomes), plan.coalitions.shape[1]
    match phase2.selection:
        case "shapley":
            phi, half_width = shapley_of_fleet(plan, outcomes, graph, phase2)
            return Ranking(padded([nested_candidates(own) for own in phi]), phi, half_width)
        case "gates" | "shift":
            scores = np.stack([outcome.scores for outcome in outcomes if outcome.scores is not None])
            threshold = OPEN_GATE if phase2.selection == "gates" else -np.inf
            return Ranking(padded([nested_by_score(own, threshold) for own in scores]), scores=scores)
        case "random":
            scores = rng.random((size, num_players))
            return Ranking(padded([nested_by_score(own) for own in scores]), scores=scores)
        case _:
            largest = (
                np.ones(num_players, bool) if phase2.selection == "all" else np.arange(num_players) == num_players - 1
            )
            return Ranking(np.tile(np.stack([np.zeros(num_players, bool), largest]), (size, 1, 1)))


def padded(nested: Sequence[np.ndarray]) -> np.ndarray:
    """``[K, m, n] bool``: every client's nested candidates, the shorter ones padded by repeating their largest set."""
    longest = max(len(rows) for rows in nested)
    return np.stack([np.concatenate([rows, np.repeat(rows[-1:], longest - len(rows), 0)]) for rows in nested])


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

"""Cohorts depend on config and round alone; the guard pools and decides as written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sylva_ray.aggregation.neighbours import NeighbourGraph, neighbour_graph
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.federation.cohorts import choose_participants, make_cohorts
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.client import PairedOutcomes
from sylva_ray.federation.stages.layer_game.rankings.ranking import GamePlan, PlayedGame, padded
from sylva_ray.federation.stages.layer_game.rankings.registry import create_ranking
from sylva_ray.federation.stages.layer_game.rankings.shapley import shapley_values
from sylva_ray.federation.stages.layer_game.selection import nested_candidates
from sylva_ray.federation.stages.layer_game.server import (
    Evidence,
    Verdict,
    accepted_strength,
    nearest_first,
    select_layers,
)
from sylva_ray.federation.stages.layer_game.tasks import GameOutcome


def config(**training: Any) -> ExperimentConfig:
    return build(ExperimentConfig, {"partition": {"num_clients": 10}, "training": training})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_clients", "cohort_size"), [(8, 4), (7, 3), (6, 3), (5, 8), (10, 1), (100, 8)])
def test_cohorts_cover_everybody_once_and_keep_two_workers_busy(num_clients: int, cohort_size: int, seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(20, 400, num_clients).tolist()
    cohorts = make_cohorts(range(num_clients), sizes, cohort_size)
    assert sorted(c for cohort in cohorts for c in cohort) == list(range(num_clients))
    assert len(cohorts) == -(-num_clients // cohort_size)
    assert all(len(cohort) <= cohort_size for cohort in cohorts)
    loads = [sum(sizes[c] for c in cohort) for cohort in cohorts]
    assert loads == sorted(loads, reverse=True)
    workers = [0, 0]
    for load in loads:
        workers[workers.index(min(workers))] += load
    if len(cohorts) % 2 == 0:
        assert max(workers) <= 1.1 * sum(sizes) / 2 + max(sizes) / 2


def ragged_steps(cohorts: Sequence[Sequence[int]], sizes: Sequence[int], batch_size: int) -> float:
    """The fraction of training steps in which the clients of a cohort do not own equally many images."""
    ragged = []
    for cohort in cohorts:
        for first in range(0, max(sizes[c] for c in cohort), batch_size):
            counts = {min(batch_size, max(0, sizes[c] - first)) for c in cohort}
            ragged.append(len(counts) > 1)
    return float(np.mean(ragged))


def test_clients_of_similar_size_share_a_cohort() -> None:
    """A fleet of 1,000 clients with Dirichlet(0.5) labels: with cohorts of equal sums, every step would be ragged."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet([0.5] * 1000, size=10)
    sizes = np.sum([rng.multinomial(5000, p) for p in share], axis=0).clip(5).tolist()
    assert ragged_steps(make_cohorts(range(1000), sizes, 8), sizes, 32) < 0.3


def test_few_cohorts_are_balanced_instead() -> None:
    sizes = [100, 90, 80, 20, 10, 10, 5, 5]
    loads = [sum(sizes[c] for c in cohort) for cohort in make_cohorts(range(8), sizes, 4)]
    assert max(loads) - min(loads) <= max(sizes) / 2


def test_who_was_missing_comes_first() -> None:
    drawn = [choose_participants(config(clients_per_round=3), round, []) for round in range(30)]
    assert len({tuple(d) for d in drawn}) > 10
    assert drawn[4] == choose_participants(config(clients_per_round=3), 4, [])
    assert {7, 8} <= set(choose_participants(config(clients_per_round=3), 4, [7, 8]))
    assert choose_participants(config(), 1, []) == list(range(10))


def guard(
    lost: Sequence[int], gained: Sequence[int], images: int = 100, benign: Sequence[int] | None = None
) -> PairedOutcomes:
    """Robust images that are lost and gained at every row, and the net gain of benign images (by default none)."""
    net = np.array(benign or [0] * len(lost))
    benign_lost, benign_gained = np.maximum(-net, 0), np.maximum(net, 0)
    return PairedOutcomes(np.stack([benign_lost, lost], 1), np.stack([benign_gained, gained], 1), images)


def alone(k: int) -> NeighbourGraph:
    return neighbour_graph(np.eye(k), np.ones(k), k=1)


def everybody(k: int) -> NeighbourGraph:
    return neighbour_graph(np.ones((k, k)), np.ones(k), k=k)


PHASE2 = Phase2Parameters(guard_tolerance=0.05, guard_confidence=0.9, guard_pool=200)


def strongest(
    client: int,
    outcomes: dict[int, PairedOutcomes],
    graph: NeighbourGraph,
    phase2: Phase2Parameters = PHASE2,
    benign_tolerance: float = 1.0,
) -> Verdict:
    changed = phase2.model_copy(update={"benign_tolerance": benign_tolerance})
    return accepted_strength(client, Evidence(outcomes, graph, changed))


def test_the_guard_takes_the_largest_row_within_the_tolerance() -> None:
    outcomes = {0: guard([0, 0, 1, 40], [0, 0, 0, 0], images=200)}
    assert strongest(0, outcomes, alone(1)).row == 2
    outcomes = {0: guard([0, 60, 60, 60], [0, 0, 0, 0], images=200)}
    assert strongest(0, outcomes, alone(1)).row == 0


def test_stronger_refinements_are_not_tried_after_one_that_fails() -> None:
    """Rows 3 and 4 would pass on their own; looking past row 2 would be another chance to be fooled."""
    outcomes = {0: guard([0, 0, 40, 0, 0], [0, 0, 0, 0, 0], images=200)}
    assert strongest(0, outcomes, alone(1)).row == 1
    outcomes = {0: guard([0, 40, 0], [0, 0, 0], images=200)}
    assert strongest(0, outcomes, alone(1)).row == 0


def test_larger_selections_are_tried_after_one_that_fails() -> None:
    """What fails by chance, or for lack of another layer, does not keep the rest out; what stands is judged later."""
    candidates = padded([nested_candidates(np.array([[3.0, 0], [2, 0], [1, 0]]))])
    outcomes = [guard([0, 0, 40, 0], [0, 0, 0, 0], images=200)]
    assert select_layers(candidates, outcomes, alone(1), PHASE2).tolist() == [[True, True, True]]
    outcomes = [guard([0, 0, 0, 40], [0, 0, 0, 0], images=200)]
    assert select_layers(candidates, outcomes, alone(1), PHASE2).tolist() == [[True, True, False]]
    outcomes = [guard([0, 40, 40, 40], [0, 0, 0, 0], images=200)]
    assert not select_layers(candidates, outcomes, alone(1), PHASE2).any()


def test_small_clients_borrow_their_neighbours_outcomes() -> None:
    """Ten images prove nothing; the neighbours' hundreds do, in either direction."""
    harmless = {0: guard([0, 0], [0, 0], 10), 1: guard([0, 0], [0, 0], 300)}
    assert strongest(0, {0: harmless[0]}, alone(1)).row == 0
    verdict = strongest(0, harmless, everybody(2))
    assert (verdict.row, verdict.pooled_images) == (1, 310)
    harmful = {0: guard([0, 0], [0, 0], 10), 1: guard([0, 90], [0, 0], 300)}
    assert strongest(0, harmful, everybody(2)).row == 0


def test_who_has_enough_guard_images_decides_alone() -> None:
    """What harms the neighbour is not refused to a client of whose own images it breaks none."""
    outcomes = {0: guard([0, 1], [0, 1], 227), 1: guard([0, 30], [0, 0], 227)}
    alone_enough = PHASE2.model_copy(update={"guard_pool": None})
    verdict = strongest(0, outcomes, everybody(2), alone_enough)
    assert (verdict.row, verdict.pooled_images) == (1, 227)
    assert strongest(1, outcomes, everybody(2), alone_enough).row == 0
    more = PHASE2.model_copy(update={"guard_pool": 400})
    assert strongest(0, outcomes, everybody(2), more).row == 0


def test_what_is_kept_must_have_raised_benign_accuracy() -> None:
    """Refinement that overfits loses benign accuracy on held-out images, and no robust one: it is not kept."""
    harmless = [0, 0, 0]
    overfit = {0: guard(harmless, harmless, 300, benign=[0, -9, -20])}
    assert strongest(0, overfit, alone(1), benign_tolerance=0.0).row == 0
    assert strongest(0, overfit, alone(1), benign_tolerance=1.0).row == 2
    unchanged = {0: guard(harmless, harmless, 300)}
    assert strongest(0, unchanged, alone(1), benign_tolerance=0.0).row == 0, "nothing rose"
    at_last = {0: guard(harmless, harmless, 300, benign=[0, 0, 9])}
    verdict = strongest(0, at_last, alone(1), benign_tolerance=0.0)
    assert verdict.row == 2, "half of the way need not show a gain yet"
    assert verdict.benign_bound < 0 < verdict.robust_bound
    at_first = {0: guard(harmless, harmless, 300, benign=[0, 9, -1])}
    assert strongest(0, at_first, alone(1), benign_tolerance=0.0).row == 1, "full strength overfits"
    both = {0: guard(harmless, harmless, 300, benign=[0, 9, 9])}
    assert strongest(0, both, alone(1), benign_tolerance=0.0).row == 2, "the strongest of equals"
    half = {0: guard([0, 0, 30], harmless, 300, benign=[0, 9, 30])}
    assert strongest(0, half, alone(1), benign_tolerance=0.0).row == 1, "of those that robustness allows"
    at_a_price = {0: guard([0, 30, 30], harmless, 300, benign=[0, 30, 30])}
    assert strongest(0, at_a_price, alone(1), benign_tolerance=0.0).row == 0, "robust accuracy fell"


def test_the_nearest_come_first_and_everybody_once() -> None:
    """0's neighbour is 1, whose neighbours are 3 and then 2; 4 is nobody's neighbour and has none, so it comes last."""
    members = np.array([[0, 1, 1], [1, 2, 3], [2, 2, 2], [3, 3, 3], [4, 4, 4]])
    weights = np.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    graph = NeighbourGraph(members, weights)
    assert list(nearest_first(0, graph)) == [1, 3, 2, 4]
    assert list(nearest_first(4, graph)) == []


def test_padding_rows_are_never_evidence() -> None:
    """A client with a short path repeats its last set, which says nothing about its neighbour's larger one."""
    candidates = padded([nested_candidates(np.array(phi)) for phi in ([[1.0, 0], [1, 0]], [[1.0, 0], [-1, 0]])])
    assert candidates.shape == (2, 3, 2)
    outcomes = [guard([0, 0, 0], [0, 0, 0], 10), guard([0, 0, 0], [0, 0, 0], 300)]
    selected = select_layers(candidates, outcomes, everybody(2), PHASE2)
    assert selected.tolist() == [[True, False], [True, False]]


def test_the_plan_is_exact_where_it_can_be_and_sampled_beyond() -> None:
    phase2 = Phase2Parameters(sampled_pairs=3)
    exact = GamePlan.from_settings(4, phase2, np.random.default_rng(0))
    values = np.random.default_rng(1).random((16, 2))
    phi, width = shapley_values(exact, values)
    assert width is None
    np.testing.assert_allclose(phi.sum(0), (values[-1] - values[0]) * [1, -1])
    sampled = GamePlan.from_settings(16, phase2, np.random.default_rng(0))
    additive = sampled.coalitions @ np.arange(32).reshape(16, 2)
    phi, width = shapley_values(sampled, additive.astype(float))
    np.testing.assert_allclose(phi, np.arange(32).reshape(16, 2) * [1, -1])
    assert width is not None
    np.testing.assert_allclose(width, 0, atol=1e-9)


def scored(*scores: Sequence[float]) -> list[GameOutcome]:
    return [GameOutcome({}, np.zeros((0, 2)), 4, 0, np.array(own)) for own in scores]


def ranked(selection: str, outcomes: Sequence[GameOutcome], k: int | None = None) -> Any:
    phase2 = Phase2Parameters(selection=selection)
    plan = GamePlan.from_settings(3, phase2, np.random.default_rng(0))
    game = PlayedGame(plan, outcomes, alone(k or len(outcomes)), phase2, np.random.default_rng(1))
    return create_ranking(selection).rank(game)


def test_gates_rank_the_open_ones_and_shift_ranks_all() -> None:
    outcomes = scored([0.9, 0.2, 0.6], [0.1, 0.0, 0.5])
    gates = ranked("gates", outcomes)
    expected = [[[0, 0, 0], [1, 0, 0], [1, 0, 1]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]]  # 0.5 is not open
    assert gates.candidates.astype(int).tolist() == expected
    assert gates.scores.tolist() == [[0.9, 0.2, 0.6], [0.1, 0.0, 0.5]]
    assert gates.phi is None
    shift = ranked("shift", outcomes).candidates
    assert shift.sum(2).tolist() == [[0, 1, 2, 3]] * 2
    assert shift[1, 1].tolist() == [False, False, True]


def test_all_and_head_are_one_candidate_besides_nothing() -> None:
    outcomes = scored([0.0] * 3, [0.0] * 3)
    assert ranked("all", outcomes).candidates.astype(int).tolist() == [[[0, 0, 0], [1, 1, 1]]] * 2
    assert ranked("head", outcomes).candidates.astype(int).tolist() == [[[0, 0, 0], [0, 0, 1]]] * 2


def test_random_orders_are_drawn_per_client_and_recorded() -> None:
    outcomes = scored(*[[0.0] * 3] * 8)
    first, again = ranked("random", outcomes), ranked("random", outcomes)
    np.testing.assert_array_equal(first.candidates, again.candidates)
    assert first.candidates.sum(2).tolist() == [[0, 1, 2, 3]] * 8
    assert len(np.unique(first.candidates, axis=0)) > 1
    assert first.scores.shape == (8, 3)


def test_shapley_ranks_by_the_values() -> None:
    """An additive game: layer 0 gains and costs nothing, layer 1 gains 1 per robust loss, layer 2 gains nothing."""
    plan = GamePlan.from_settings(3, Phase2Parameters(), np.random.default_rng(0))
    values = plan.coalitions @ np.array([[0.2, 0.0], [0.1, -0.1], [0.0, 0.3]])
    ranking = ranked("shapley", [GameOutcome({}, values, 10**6, 0)])
    assert ranking.candidates.astype(int).tolist() == [[[0, 0, 0], [1, 0, 0], [1, 1, 0]]]
    np.testing.assert_allclose(ranking.phi[..., 0], [[0.2, 0.1, 0.0]], atol=1e-12)
    np.testing.assert_allclose(ranking.phi[..., 1], [[0.0, 0.1, -0.3]], atol=1e-12)
    assert ranking.scores is None

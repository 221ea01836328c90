"""The exact game is played where it costs no more than phase 1; else a sample that does, with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from sylva_ray.algorithms.sylva import Sylva
from sylva_ray.algorithms.undefended import Undefended
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.cost import block_evaluations, game_cost, phase1_cost
from sylva_ray.federation.stages.layer_game.rankings.ranking import GamePlan
from sylva_ray.federation.stages.layer_game.rankings.shapley import shapley_values
from sylva_ray.federation.stages.layer_game.shapley import (
    MIN_PAIRS,
    all_coalitions,
    exact_shapley,
    permutation_shapley,
    prefix_coalitions,
)

PHASE2 = Phase2Parameters()


def test_blocks_are_counted_as_the_walk_evaluates_them() -> None:
    assert block_evaluations(all_coalitions(7), is_chain=True) == 2**7 - 2
    assert block_evaluations(all_coalitions(13), is_chain=True) == 2**13 - 2
    assert block_evaluations(all_coalitions(4), is_chain=False) == 16 * 3
    assert game_cost(all_coalitions(7), [10, 5], is_chain=True) == 3 * 15 * 126


def test_phase_1_is_counted_in_gradients_of_images() -> None:
    sections = {
        "attack": {"steps": 10},
        "training": {"rounds": 4, "local_epochs": 2, "clients_per_round": 1},
        "partition": {"num_clients": 2},
    }
    config = build(ExperimentConfig, sections)
    epochs = {"final_local_epochs": 1, "head_warmup_epochs": 3}
    sylva, undefended = Sylva(Sylva.Parameters(**epochs)), Undefended(Undefended.Parameters(**epochs))
    # half of the clients in 4 rounds of 2 epochs, all in the last one; 11 gradients of an image in each
    assert phase1_cost(config, sylva, [30, 10], num_blocks=12) == 40 * 12 * (2 * 11 * (4 + 1) + 2 * 3)
    benign = config.model_copy(update={"attack": config.attack.model_copy(update={"epsilon": 0.0})})
    assert phase1_cost(benign, sylva, [30, 10], num_blocks=1) == 40 * (2 * 5 + 6)
    assert phase1_cost(config, undefended, [30, 10], num_blocks=1) == 40 * (2 * 5 + 6)


def plan(num_players: int, cost_of_all: float, phase2: Phase2Parameters = PHASE2) -> GamePlan:
    everything = block_evaluations(all_coalitions(num_players), is_chain=True)

    def relative_cost(coalitions: np.ndarray) -> float:
        return cost_of_all * block_evaluations(coalitions, is_chain=True) / everything

    return GamePlan.from_settings(num_players, phase2, np.random.default_rng(0), relative_cost)


@pytest.mark.parametrize(("players", "cost"), [(7, 50.0), (8, 50.0), (13, 1.0), (10, 0.2)])
def test_small_and_cheap_games_are_exact(players: int, cost: float) -> None:
    found = plan(players, cost)
    assert found.permutations is None
    assert len(found.coalitions) == 2**players
    assert found.reason == ""


@pytest.mark.parametrize(("cost", "max_cost"), [(1.5, 1.0), (4.0, 1.0), (10.0, 3.0)])
def test_a_game_beyond_its_cost_is_sampled_as_far_as_it_may_cost(cost: float, max_cost: float) -> None:
    found = plan(13, cost, PHASE2.model_copy(update={"max_cost": max_cost}))
    assert found.permutations is not None
    assert found.relative_cost is not None
    assert found.relative_cost <= max_cost
    assert f"all 8192 coalitions would cost {cost:g} times phase 1" in found.reason
    assert f"{len(found.permutations) // 2} pairs of permutations were sampled" in found.reason
    np.testing.assert_array_equal(found.coalitions, prefix_coalitions(found.permutations))


def test_a_few_pairs_are_always_played() -> None:
    found = plan(13, 10_000.0)
    assert found.permutations is not None
    assert len(found.permutations) == 2 * MIN_PAIRS
    assert found.relative_cost is not None
    assert found.relative_cost > 1, "the record says what it costs"


def test_intervals_of_a_sampled_game_hold_the_exact_values() -> None:
    rng = np.random.default_rng(3)
    pairwise = rng.normal(size=(13, 13, 2)) / 13
    weights = rng.normal(size=(13, 2))

    def value(coalitions: np.ndarray) -> np.ndarray:
        s = coalitions.astype(float)
        noise = np.sin(37 * s @ np.arange(1, 14))[:, None] / 50
        return s @ weights + np.einsum("mi,mj,ijk->mk", s, s, pairwise) + noise

    exact = exact_shapley(value(all_coalitions(13)) * [1, -1])
    found = plan(13, 4.0)
    estimate, half_width = shapley_values(found, value(found.coalitions))
    assert half_width is not None
    error = estimate - exact
    assert np.mean(np.abs(error[:, 0] - error[:, 1]) <= half_width) >= 0.8
    assert np.abs(error).max() < 0.1


def test_the_interval_of_a_difference_knows_that_its_parts_move_together() -> None:
    """Robust losses that are the benign gains: the difference is 0 and certain. Gains on both: twice the benign one."""
    found = plan(13, 4.0)
    assert found.permutations is not None
    gain = np.random.default_rng(0).normal(size=len(found.coalitions))
    own = permutation_shapley(found.permutations, found.coalitions, gain).half_width
    for robust, factor in ((-gain, 0.0), (gain, 2.0)):
        _, half_width = shapley_values(found, np.stack([gain, robust], axis=1))
        assert half_width is not None
        np.testing.assert_allclose(half_width, factor * own, atol=1e-12)

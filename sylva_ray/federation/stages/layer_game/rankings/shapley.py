"""Ranking by Shapley values: what a layer adds to benign accuracy, and what it costs in robustness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.client import Phase2Client
from sylva_ray.federation.stages.layer_game.rankings.ranking import (
    Answer,
    GamePlan,
    LayerMeasurement,
    PlayedGame,
    RankedLayers,
    Ranking,
    padded,
)
from sylva_ray.federation.stages.layer_game.selection import nested_candidates, shrink
from sylva_ray.federation.stages.layer_game.shapley import exact_shapley, permutation_shapley
from sylva_ray.federation.stages.layer_game.values import coalition_values


@dataclass(frozen=True)
class ShapleyRanking(Ranking):
    """Ranks layers by phi_benign - lambda phi_robust, as lambda, the price of robustness, falls from infinity to 0."""

    name: ClassVar[str] = "shapley"
    evaluates_coalitions: ClassVar[bool] = True
    axis: ClassVar[str] = "Shapley value"
    caption: ClassVar[str] = (
        "The Shapley value of a layer (row) for a client (column) is what refining it on benign data adds to "
        "the probability of the right answer on unchanged images, minus what it takes away on attacked ones: "
        "blue gains, orange costs."
    )

    def measure(self, player: Phase2Client, benign: ParameterStack, coalitions: np.ndarray) -> list[LayerMeasurement]:
        """Measure the mean probability of the true class of every coalition on the selection split, benign and robust.

        The robust probability of an image is the smaller one of two fixed adversarial images, made against theta^r and
        theta^b. Fixed images overestimate the robustness of mixtures, so the guard attacks anew.
        """
        images = player.selection_images(benign)
        with player.stopwatch("game"):
            found = [
                coalition_values(player, benign, coalitions, images, client, player.value_precision)
                for client in range(len(player.clients))
            ]
        return [LayerMeasurement(values, block_evaluations=evaluations) for values, evaluations in found]

    def rank(self, game: PlayedGame) -> RankedLayers:
        """See `Ranking.rank`."""
        phi, half_width = shapley_of_fleet(game.plan, game.answers, game.graph, game.phase2)
        return RankedLayers(padded([nested_candidates(values) for values in phi]), phi, half_width)


def shapley_of_fleet(
    plan: GamePlan, outcomes: Sequence[Answer], graph: NeighbourGraph, phase2: Phase2Parameters
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return ``phi [K, n, 2]``, shrunk towards the means of neighbourhoods, and half widths ``[K, n]`` if sampled."""
    estimates = [shapley_values(plan, outcome.values) for outcome in outcomes]
    samples = np.array([outcome.num_samples for outcome in outcomes])
    phi = shrink(np.stack([value for value, _ in estimates]), graph.matrix(), samples, phase2.shrink_strength)
    widths = [width for _, width in estimates if width is not None]
    return phi, np.stack(widths) if widths else None


def shapley_values(plan: GamePlan, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return ``phi [n, 2]`` from ``values [m, 2]``, and if sampled the half widths of phi[:, 0] - phi[:, 1], ``[n]``.

    Values are mean probabilities of the true class, benign and robust. phi[:, 0] is the part of the benign gain that is
    due to a player, phi[:, 1] the part of the robust *loss* (hence the sign). Both come from the same permutations, so
    the interval is estimated of their difference.
    """
    payoff = values * np.array([1.0, -1.0])
    if plan.permutations is None:
        return exact_shapley(payoff), None
    with_difference = np.column_stack([payoff, payoff[:, 0] - payoff[:, 1]])
    estimate = permutation_shapley(plan.permutations, plan.coalitions, with_difference)
    return estimate.value[:, :2], estimate.half_width[:, 2]

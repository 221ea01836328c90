"""Ranking by greedy search in the values of all coalitions, for comparison with their Shapley values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sylva_ray.federation.stages.layer_game.rankings.ranking import PlayedGame, RankedLayers, padded
from sylva_ray.federation.stages.layer_game.rankings.shapley import ShapleyRanking
from sylva_ray.federation.stages.layer_game.selection import nested_by_order, shrink


@dataclass(frozen=True)
class GreedyRanking(ShapleyRanking):
    """Adds the layer that raises benign plus robust probability most, until none does.

    The values of the coalitions are those of `ShapleyRanking`, shrunk like Shapley values.
    """

    name: ClassVar[str] = "greedy"
    axis: ClassVar[str] = ""
    caption: ClassVar[str] = "Layers were added one by one, the one with the best next coalition first."
    needs_all_coalitions: ClassVar[bool] = True

    def rank(self, game: PlayedGame) -> RankedLayers:
        """See `Ranking.rank`."""
        values = np.stack([answer.values for answer in game.answers])
        samples = np.array([answer.num_samples for answer in game.answers])
        shrunk = shrink(values, game.graph.matrix(), samples, game.phase2.shrink_strength)
        num_players = game.plan.num_players
        return RankedLayers(padded([nested_by_order(greedy_order(own.sum(1)), num_players) for own in shrunk]))


def greedy_order(values: np.ndarray) -> np.ndarray:
    """Return the players in the order in which greedy search adds them, from ``values [2^n]``.

    Row s of the values is the coalition of the players whose bits are set in s. The search ends where no player raises
    the value.

    >>> greedy_order(np.array([0.0, 1.0, 2.0, 2.5, 0.5, 0.5, 1.5, 2.0])).tolist()
    [1, 0]
    """
    coalition = 0
    order: list[int] = []
    while True:
        left = [player for player in range(len(values).bit_length() - 1) if not coalition >> player & 1]
        best = max(left, key=lambda player: values[coalition | 1 << player], default=None)
        if best is None or not values[coalition | 1 << best] > values[coalition]:
            return np.array(order, int)
        order.append(best)
        coalition |= 1 << best

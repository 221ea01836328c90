"""Rankings by the name that ``algorithm.phase2.selection`` gives them."""

from __future__ import annotations

from sylva_ray.federation.stages.layer_game.rankings.gates import GatesRanking
from sylva_ray.federation.stages.layer_game.rankings.greedy import GreedyRanking
from sylva_ray.federation.stages.layer_game.rankings.ranking import Ranking
from sylva_ray.federation.stages.layer_game.rankings.shapley import ShapleyRanking
from sylva_ray.federation.stages.layer_game.rankings.shift import ShiftRanking
from sylva_ray.federation.stages.layer_game.rankings.simple import AllRanking, HeadRanking, RandomRanking

RANKINGS: dict[str, type[Ranking]] = {
    ranking.name: ranking
    for ranking in (
        ShapleyRanking,
        GreedyRanking,
        GatesRanking,
        ShiftRanking,
        AllRanking,
        HeadRanking,
        RandomRanking,
    )
}


def create_ranking(name: str) -> Ranking:
    """Return the ranking of that name."""
    return RANKINGS[name]()

"""Rankings that measure nothing, for comparison: a random order, all layers, the head alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sylva_ray.federation.stages.layer_game.rankings.ranking import PlayedGame, RankedLayers, Ranking, ranked_by


@dataclass(frozen=True)
class RandomRanking(Ranking):
    """Ranks layers in a random order."""

    name: ClassVar[str] = "random"
    axis: ClassVar[str] = "random score"
    caption: ClassVar[str] = "What ranked a layer (row) for a client (column), a random number."

    def rank(self, game: PlayedGame) -> RankedLayers:
        """See `Ranking.rank`."""
        return ranked_by(game.rng.random((len(game.answers), game.plan.num_players)))


@dataclass(frozen=True)
class AllRanking(Ranking):
    """Has one candidate: all layers."""

    name: ClassVar[str] = "all"
    caption: ClassVar[str] = "Every client was offered all layers; the guard decided who may refine."

    def rank(self, game: PlayedGame) -> RankedLayers:
        """See `Ranking.rank`."""
        return _one_candidate(game, np.ones(game.plan.num_players, bool))


@dataclass(frozen=True)
class HeadRanking(Ranking):
    """Has one candidate: the head."""

    name: ClassVar[str] = "head"
    caption: ClassVar[str] = "Every client was offered the head alone; the guard decided who may refine."

    def rank(self, game: PlayedGame) -> RankedLayers:
        """See `Ranking.rank`."""
        return _one_candidate(game, np.arange(game.plan.num_players) == game.plan.num_players - 1)


def _one_candidate(game: PlayedGame, largest: np.ndarray) -> RankedLayers:
    """Return the empty selection and ``largest [n] bool`` for every client."""
    return RankedLayers(np.tile(np.stack([np.zeros(len(largest), bool), largest]), (len(game.answers), 1, 1)))

"""Rankings that measure nothing, to compare with: a random order, all layers, the head alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.rankings.ranking import Answer, GamePlan, RankedLayers, Ranking, padded
from sylva_ray.federation.stages.layer_game.selection import nested_by_score


@dataclass(frozen=True)
class RandomRanking(Ranking):
    """A random order."""

    name: ClassVar[str] = "random"
    axis: ClassVar[str] = "random score"
    caption: ClassVar[str] = "What ranked a layer (row) for a client (column), a random number."

    def rank(
        self,
        plan: GamePlan,
        answers: Sequence[Answer],
        graph: NeighbourGraph,
        phase2: Phase2Parameters,
        rng: np.random.Generator,
    ) -> RankedLayers:
        """See `Ranking.rank`."""
        del graph, phase2
        scores = rng.random((len(answers), plan.num_players))
        return RankedLayers(padded([nested_by_score(own) for own in scores]), scores=scores)


@dataclass(frozen=True)
class AllRanking(Ranking):
    """One candidate: all layers."""

    name: ClassVar[str] = "all"
    caption: ClassVar[str] = "Every client was offered all layers; the guard decided who may refine."

    def rank(
        self,
        plan: GamePlan,
        answers: Sequence[Answer],
        graph: NeighbourGraph,
        phase2: Phase2Parameters,
        rng: np.random.Generator,
    ) -> RankedLayers:
        """See `Ranking.rank`."""
        del graph, phase2, rng
        return _one_candidate(np.ones(plan.num_players, bool), len(answers))


@dataclass(frozen=True)
class HeadRanking(Ranking):
    """One candidate: the head."""

    name: ClassVar[str] = "head"
    caption: ClassVar[str] = "Every client was offered the head alone; the guard decided who may refine."

    def rank(
        self,
        plan: GamePlan,
        answers: Sequence[Answer],
        graph: NeighbourGraph,
        phase2: Phase2Parameters,
        rng: np.random.Generator,
    ) -> RankedLayers:
        """See `Ranking.rank`."""
        del graph, phase2, rng
        return _one_candidate(np.arange(plan.num_players) == plan.num_players - 1, len(answers))


def _one_candidate(largest: np.ndarray, num_clients: int) -> RankedLayers:
    """The empty selection and ``largest [n] bool``, for every client."""
    return RankedLayers(np.tile(np.stack([np.zeros(len(largest), bool), largest]), (num_clients, 1, 1)))

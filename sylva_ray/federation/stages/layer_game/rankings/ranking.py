"""What ranks a fleet's layers for benign refinement: the interface of a ranking, and the candidates it yields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.client import Phase2Client, SelectionImages
from sylva_ray.federation.stages.layer_game.selection import nested_by_score
from sylva_ray.federation.stages.layer_game.shapley import (
    MAX_EXACT_PLAYERS,
    all_coalitions,
    antithetic_permutations,
    prefix_coalitions,
)


@dataclass(frozen=True)
class LayerMeasurement:
    """What a client measured on its selection split: ``values [m, 2]`` of coalitions (benign, robust), or ``scores [n]`` of the
    layers, or neither. ``block_evaluations`` counts blocks run per input set."""

    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    scores: np.ndarray | None = None
    block_evaluations: int = 0


class Answer(Protocol):
    """What the coordinator knows of a client: see `sylva_ray.federation.stages.layer_game.tasks.GameOutcome`."""

    @property
    def values(self) -> np.ndarray:
        """``[m, 2]``."""
        ...

    @property
    def scores(self) -> np.ndarray | None:
        """``[n]``."""
        ...

    @property
    def num_samples(self) -> int:
        """Selection images behind them."""
        ...


@dataclass(frozen=True)
class GamePlan:
    """Which coalitions every client evaluates; the same for all, so that they can share a stack.

    ``permutations`` is None when all 2^n coalitions are played and the Shapley values are exact."""

    coalitions: np.ndarray
    permutations: np.ndarray | None

    @property
    def num_players(self) -> int:
        """n: layers, and the head."""
        return self.coalitions.shape[1]

    @staticmethod
    def from_settings(num_players: int, phase2: Phase2Parameters, rng: np.random.Generator) -> GamePlan:
        """Exact up to `MAX_EXACT_PLAYERS` players, antithetic permutation sampling beyond."""
        if num_players <= MAX_EXACT_PLAYERS:
            return GamePlan(all_coalitions(num_players), None)
        permutations = antithetic_permutations(num_players, phase2.sampled_pairs, rng)
        return GamePlan(prefix_coalitions(permutations), permutations)


@dataclass(frozen=True)
class RankedLayers:
    """How the fleet's layers were ranked: ``candidates [K, m, n]``, and what they were ranked by (None: not by that).

    ``phi [K, n, 2]`` are Shapley values with ``half_width`` if sampled; ``scores [K, n]`` are gates or the like."""

    candidates: np.ndarray
    phi: np.ndarray | None = None
    half_width: np.ndarray | None = None
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class PlayedGame:
    """What the coordinator ranks by: the plan, all clients' ``answers``, who speaks for whom, the settings, and a generator."""

    plan: GamePlan
    answers: Sequence[Answer]
    graph: NeighbourGraph
    phase2: Phase2Parameters
    rng: np.random.Generator


@dataclass(frozen=True)
class Ranking:
    """One way to rank layers: a client half and a server half. Frozen plain data, since it travels with the task."""

    name: ClassVar[str] = "none"
    """Value of ``algorithm.phase2.selection``."""
    axis: ClassVar[str] = ""
    """What the numbers are, for a figure's colour bar; empty: there are none."""
    caption: ClassVar[str] = ""
    """A figure's caption, or, where there are no numbers, what was offered to the clients."""
    needs_chain: ClassVar[bool] = False
    """Whether the model must be a plain chain of blocks that can be run one by one."""

    def measure(self, player: Phase2Client, benign: ParameterStack, coalitions: np.ndarray) -> list[LayerMeasurement]:
        """What every client of the cohort measures; ``benign`` is theta^b, ``coalitions [m, n] bool``. Here nothing."""
        del benign, coalitions
        return [LayerMeasurement() for _ in player.clients]

    def rank(self, game: PlayedGame) -> RankedLayers:
        """Every client's candidate selections; the last player is the head."""
        raise NotImplementedError


@dataclass(frozen=True)
class ScoreRanking(Ranking):
    """Layers in the order of a score that clients measure, the largest first."""

    threshold: ClassVar[float] = -np.inf
    """A layer whose score is not above this is no candidate."""

    def scores(self, player: Phase2Client, benign: ParameterStack, images: SelectionImages) -> np.ndarray:
        """``[C, n]``; the arguments are those of `measure`, and the images that it is measured on."""
        raise NotImplementedError

    def measure(self, player: Phase2Client, benign: ParameterStack, coalitions: np.ndarray) -> list[LayerMeasurement]:
        """See `Ranking.measure`."""
        del coalitions
        images = player.selection_images(benign)
        with player.stopwatch("game"):
            return [LayerMeasurement(scores=own) for own in self.scores(player, benign, images)]

    def rank(self, game: PlayedGame) -> RankedLayers:
        """See `Ranking.rank`."""
        scores = np.stack([answer.scores for answer in game.answers if answer.scores is not None])
        return ranked_by(scores, self.threshold)


def ranked_by(scores: np.ndarray, threshold: float = -np.inf) -> RankedLayers:
    """Nested candidates by ``scores [K, n]`` above ``threshold``."""
    return RankedLayers(padded([nested_by_score(own, threshold) for own in scores]), scores=scores)


def padded(nested: Sequence[np.ndarray]) -> np.ndarray:
    """``[K, m, n] bool``: every client's nested candidates, the shorter ones padded by repeating their largest set."""
    longest = max(len(rows) for rows in nested)
    return np.stack([np.concatenate([rows, np.repeat(rows[-1:], longest - len(rows), 0)]) for rows in nested])

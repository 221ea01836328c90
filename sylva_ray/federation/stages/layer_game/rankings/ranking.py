"""Rankings of layers for benign refinement: their interface, and the candidates that they result in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.client import Phase2Client, SelectionImages
from sylva_ray.federation.stages.layer_game.selection import nested_by_score
from sylva_ray.federation.stages.layer_game.shapley import (
    MAX_ALWAYS_EXACT_PLAYERS,
    MAX_EXACT_PLAYERS,
    MIN_PAIRS,
    all_coalitions,
    antithetic_permutations,
    prefix_coalitions,
)


@dataclass(frozen=True)
class LayerMeasurement:
    """What a client measured on its selection split.

    Attributes:
        values: ``[m, 2]`` of coalitions, benign and robust; empty if none were evaluated.
        scores: ``[n]`` of the layers; None if there are none.
        block_evaluations: blocks run per input set.
    """

    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    scores: np.ndarray | None = None
    block_evaluations: int = 0


class Answer(Protocol):
    """What the coordinator knows of a client: see `sylva_ray.federation.stages.layer_game.tasks.GameOutcome`."""

    @property
    def values(self) -> np.ndarray:
        """Of coalitions, ``[m, 2]``: benign and robust."""
        ...

    @property
    def scores(self) -> np.ndarray | None:
        """Of layers, ``[n]``; or None."""
        ...

    @property
    def num_samples(self) -> float:
        """Number of selection images, the effective one where they have weights."""
        ...


@dataclass(frozen=True)
class GamePlan:
    """The coalitions that every client evaluates; they are the same for all clients, which can thus share a stack.

    Attributes:
        coalitions: ``[m, n] bool``.
        permutations: of the players, if coalitions are sampled; None: all 2^n are evaluated, and Shapley values are
            exact.
        relative_cost: times that of phase 1; None: not counted.
        reason: why coalitions are sampled; empty: they are not.
    """

    coalitions: np.ndarray
    permutations: np.ndarray | None
    relative_cost: float | None = None
    reason: str = ""

    @property
    def num_players(self) -> int:
        """The number n of layers, the head included."""
        return int(self.coalitions.shape[1])

    @staticmethod
    def from_settings(
        num_players: int,
        phase2: Phase2Parameters,
        rng: np.random.Generator,
        relative_cost: Callable[[np.ndarray], float] | None = None,
    ) -> GamePlan:
        """Choose the coalitions: all of them, or those of as many antithetic permutations as the game may cost.

        All coalitions are evaluated up to `MAX_ALWAYS_EXACT_PLAYERS` players, and up to `MAX_EXACT_PLAYERS` players if
        that costs at most ``phase2.max_cost``.

        Args:
            num_players: n.
            phase2: the largest cost, and the largest number of pairs of permutations.
            rng: draws the permutations.
            relative_cost: of evaluating coalitions ``[m, n]``, times that of phase 1; None: it does not matter.
        """
        reason = f"{num_players} players have too many coalitions; at most {MAX_EXACT_PLAYERS} can be exact"
        if num_players <= MAX_EXACT_PLAYERS:
            everything = all_coalitions(num_players)
            if num_players <= MAX_ALWAYS_EXACT_PLAYERS or relative_cost is None:
                return GamePlan(everything, None)
            cost = relative_cost(everything)
            if cost <= phase2.max_cost:
                return GamePlan(everything, None, cost)
            reason = (
                f"all {len(everything)} coalitions would cost {cost:.3g} times phase 1, "
                f"which exceeds phase2.max_cost={phase2.max_cost:g}"
            )
        permutations = antithetic_permutations(num_players, phase2.sampled_pairs, rng)
        if relative_cost is None:
            return GamePlan(prefix_coalitions(permutations), permutations, reason=reason)
        num_pairs = phase2.sampled_pairs
        while True:
            sampled = permutations[: 2 * num_pairs]
            coalitions = prefix_coalitions(sampled)
            cost = relative_cost(coalitions)
            if cost <= phase2.max_cost or num_pairs <= MIN_PAIRS:
                return GamePlan(coalitions, sampled, cost, f"{reason}; {num_pairs} pairs of permutations were sampled")
            num_pairs = max(MIN_PAIRS, 3 * num_pairs // 4)


@dataclass(frozen=True)
class RankedLayers:
    """The ranking of the layers of all clients.

    Attributes:
        candidates: ``[K, m, n] bool``.
        phi: Shapley values ``[K, n, 2]``, if they rank the layers.
        half_width: of the intervals of phi[..., 0] - phi[..., 1] before they are shrunk, ``[K, n]``, if sampled.
        scores: ``[K, n]``, if scores rank the layers.
    """

    candidates: np.ndarray
    phi: np.ndarray | None = None
    half_width: np.ndarray | None = None
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class PlayedGame:
    """What the coordinator ranks layers by.

    Attributes:
        plan: the coalitions.
        answers: of all clients.
        graph: the neighbourhoods.
        phase2: the parameters of phase 2.
        rng: for rankings that draw random numbers.
    """

    plan: GamePlan
    answers: Sequence[Answer]
    graph: NeighbourGraph
    phase2: Phase2Parameters
    rng: np.random.Generator


@dataclass(frozen=True)
class Ranking:
    """A way to rank layers, with a client half and a server half; frozen plain data that is sent with the task."""

    name: ClassVar[str] = "none"
    """Value of ``algorithm.phase2.selection``."""
    axis: ClassVar[str] = ""
    """Label of the numbers on a colour bar; empty: there are no numbers."""
    caption: ClassVar[str] = ""
    """Caption of the figure, or, without numbers, what the candidates were."""
    needs_chain: ClassVar[bool] = False
    """Whether the model must be a plain chain of blocks that can be run one by one."""
    evaluates_coalitions: ClassVar[bool] = False
    """Whether clients evaluate coalitions, which costs what `GamePlan` counts."""
    needs_all_coalitions: ClassVar[bool] = False
    """Whether the values of all 2^n coalitions are needed, and not a sample of them."""

    def measure(self, player: Phase2Client, benign: ParameterStack, coalitions: np.ndarray) -> list[LayerMeasurement]:
        """Measure every client of the cohort; ``benign`` is theta^b, ``coalitions [m, n] bool``. By default nothing."""
        del benign, coalitions
        return [LayerMeasurement() for _ in player.clients]

    def rank(self, game: PlayedGame) -> RankedLayers:
        """Return the candidate selections of every client; the last player is the head."""
        raise NotImplementedError


@dataclass(frozen=True)
class ScoreRanking(Ranking):
    """Ranks layers by a score that clients measure, the largest first."""

    threshold: ClassVar[float] = -np.inf
    """A layer with this score or less is not a candidate."""

    def scores(self, player: Phase2Client, benign: ParameterStack, images: SelectionImages) -> np.ndarray:
        """Return scores ``[C, n]``; the arguments are those of `measure` and the images to measure on."""
        raise NotImplementedError

    def measure(self, player: Phase2Client, benign: ParameterStack, coalitions: np.ndarray) -> list[LayerMeasurement]:
        """See `Ranking.measure`."""
        del coalitions
        images = player.selection_images(benign)
        with player.stopwatch("game"):
            return [LayerMeasurement(scores=scores) for scores in self.scores(player, benign, images)]

    def rank(self, game: PlayedGame) -> RankedLayers:
        """See `Ranking.rank`."""
        scores = np.stack([answer.scores for answer in game.answers if answer.scores is not None])
        return ranked_by(scores, self.threshold)


def ranked_by(scores: np.ndarray, threshold: float = -np.inf) -> RankedLayers:
    """Return nested candidates by ``scores [K, n]`` above ``threshold``."""
    return RankedLayers(padded([nested_by_score(row, threshold) for row in scores]), scores=scores)


def padded(nested: Sequence[np.ndarray]) -> np.ndarray:
    """Stack the nested candidates of all clients, ``[K, m, n] bool``; the largest set of shorter ones is repeated."""
    longest = max(len(rows) for rows in nested)
    return np.stack([np.concatenate([rows, np.repeat(rows[-1:], longest - len(rows), 0)]) for rows in nested])

"""The layer game, which selects the layers that can be refined on benign data without losing robustness."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sylva_ray.core.errors import UserError
from sylva_ray.core.records import GameRecord
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.text import clients_text
from sylva_ray.core.types import stack_states
from sylva_ray.federation.observer import Notice
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.layer_game.client import PairedOutcomes
from sylva_ray.federation.stages.layer_game.cost import game_cost, phase1_cost
from sylva_ray.federation.stages.layer_game.rankings.ranking import GamePlan, PlayedGame, RankedLayers, Ranking
from sylva_ray.federation.stages.layer_game.server import NOTHING_KEPT, columns, select_layers
from sylva_ray.federation.stages.layer_game.shapley import MAX_EXACT_PLAYERS
from sylva_ray.federation.stages.layer_game.tasks import CandidatesTask, GameOutcome, GameTask, VerifyTask
from sylva_ray.federation.stages.stage import Stage, StageResult
from sylva_ray.models.cohort import CohortModel

MAX_DIFFERENCE = 0.02
"""Largest difference of a probability in a lower precision; beyond it, the game is played in float32."""


@dataclass(frozen=True)
class _Game:
    """A game that has been played.

    Attributes:
        outcomes: of the K clients.
        ranked: the layers, and the candidates.
        selected: ``[K, n] bool``.
    """

    outcomes: list[GameOutcome]
    ranked: RankedLayers
    selected: np.ndarray


class LayerGame(Stage):
    """1 play, 2 rank the layers, 3 try candidates, 4 select. The models are not changed.

    Args:
        ranking: of the layers.
        phase2: the parameters of phase 2.
    """

    name = "layer_game"
    title = "phase 2: layer game"
    phase = 2
    needs_neighbours = True
    evaluated = "never"

    def __init__(self, ranking: Ranking, phase2: Phase2Parameters) -> None:
        self.ranking, self.phase2 = ranking, phase2

    def check(self, model: CohortModel) -> None:
        """See `Stage.check`: the model needs adapters, and for some rankings blocks that can be run one by one."""
        from sylva_ray.models.lora import LoraStack  # it imports timm

        if not isinstance(model, LoraStack):
            raise UserError("algorithm.model", "full", f"the stage {self.name} needs adapters: use lora")
        if self.ranking.needs_chain and model.num_blocks is None:
            fix = (
                "needs a plain chain of transformer blocks that all have adapters; "
                "use shapley (algorithm.phase2.selection)"
            )
            raise UserError("ranking", self.ranking.name, fix)
        if self.ranking.needs_all_coalitions and len(model.players) > MAX_EXACT_PLAYERS:
            fix = f"evaluates all coalitions of at most {MAX_EXACT_PLAYERS} layers, and there are {len(model.players)}"
            raise UserError("algorithm.phase2.selection", self.ranking.name, f"{fix}; use shapley")

    def _plan(self, server: Server, rng: np.random.Generator) -> GamePlan:
        """Choose the coalitions; their number is limited by what the game may cost."""
        phase2, num_players = self.phase2, len(server.players)
        if not self.ranking.evaluates_coalitions or self.ranking.needs_all_coalitions:
            return GamePlan.from_settings(num_players, phase2, rng)
        before = phase1_cost(server.config, server.algorithm, server.sizes, num_players - 1)
        is_chain = list(server.players)[:-1] == [f"blocks.{index}" for index in range(num_players - 1)]
        images = [min(phase2.max_images, len(client.selection)) for client in server.fleet.clients]

        def relative_cost(coalitions: np.ndarray) -> float:
            return game_cost(coalitions, images, is_chain) / max(1, before)

        return GamePlan.from_settings(num_players, phase2, rng, relative_cost)

    def run(self, server: Server, step: int) -> StageResult:
        """See `Stage.run`. Values in a lower precision are verified in float32 on what they select."""
        phase2, everyone = self.phase2, server.everyone
        rng = numpy_generator(server.config.seed, "game", round=step)
        plan = self._plan(server, rng)
        low = server.config.evaluation.precision
        difference = None
        game = self._played(server, step, plan, low if self.ranking.evaluates_coalitions else "float32", rng)
        if self.ranking.evaluates_coalitions and low != "float32":
            difference = self._difference(server, step, game, low)
            if not difference <= MAX_DIFFERENCE:  # also where it is no number
                server.observer.on_notice(Notice(f"values in {low} are off by {difference:.3f}: float32 plays again"))
                game = self._played(server, step, plan, "float32", rng)
        outcomes, ranked, selected = game.outcomes, game.ranked, game.selected
        candidates = ranked.candidates
        phi, width, scores = ranked.phi, ranked.half_width, ranked.scores
        if phi is not None and (without := np.flatnonzero(~np.isfinite(phi).all((1, 2)))).size:
            text = f"the layer game has no finite values of {clients_text(without.tolist())}, who refine nothing"
            server.observer.on_notice(Notice(text))
        server.game = GameRecord(
            players=list(server.players),
            selection=self.ranking.name,
            shapley=None if phi is None else _rows(phi[:, :, 0] - phi[:, :, 1]),
            shapley_benign=None if phi is None else _rows(phi[:, :, 0]),
            shapley_robust=None if phi is None else _rows(phi[:, :, 1]),
            half_width=None if width is None else _rows(width),
            scores=None if scores is None else _rows(scores),
            selected=selected.tolist(),
            candidates=[len(np.unique(rows, axis=0)) for rows in candidates],
            coalitions_evaluated=sum(len(outcome.values) for outcome in outcomes),
            block_evaluations=sum(outcome.block_evaluations for outcome in outcomes),
            exact=plan.permutations is None,
            value_difference=difference if difference is None or math.isfinite(difference) else None,
            relative_cost=plan.relative_cost,
            sampled_because=(plan.reason or None) if self.ranking.evaluates_coalitions else None,
            **columns([NOTHING_KEPT] * len(everyone), phase2.strengths),
        )
        server.costs.download_bytes += selected.nbytes
        return StageResult(lr=phase2.benign_lr)

    def _played(self, server: Server, step: int, plan: GamePlan, precision: str, rng: np.random.Generator) -> _Game:
        """Play, rank the layers, try candidates and select."""
        phase2, everyone = self.phase2, server.everyone
        cohorts = server.cohorts(everyone)
        played: dict[int, GameOutcome] = server.run(
            [
                GameTask(step, cohort, server.stack(cohort), phase2, plan.coalitions, self.ranking, precision)
                for cohort in cohorts
            ]
        )
        outcomes = [played[client] for client in everyone]
        graph = server.recorded_neighbourhood()
        ranked = self.ranking.rank(PlayedGame(plan, outcomes, graph, phase2, rng))
        candidates = ranked.candidates
        tried: dict[int, PairedOutcomes] = server.run(
            [
                CandidatesTask(
                    step,
                    cohort,
                    server.stack(cohort),
                    phase2,
                    stack_states([played[client].benign_state for client in cohort]),
                    candidates[list(cohort)],
                )
                for cohort in cohorts
            ]
        )
        selected = select_layers(candidates, [tried[client] for client in everyone], graph, phase2)
        reported = [outcome.values if outcome.scores is None else outcome.scores for outcome in outcomes]
        server.costs.upload_bytes += sum(values.nbytes for values in reported)
        server.costs.upload_bytes += sum(outcome.num_bytes for outcome in tried.values())
        server.costs.download_bytes += candidates.nbytes
        return _Game(outcomes, ranked, selected)

    def _difference(self, server: Server, step: int, game: _Game, precision: str) -> float:
        """Return the largest difference of a value of a candidate from that in float32."""
        candidates = game.ranked.candidates
        tasks = [
            VerifyTask(
                step,
                cohort,
                server.stack(cohort),
                self.phase2,
                stack_states([game.outcomes[client].benign_state for client in cohort]),
                candidates[list(cohort)],
                precision,
            )
            for cohort in server.cohorts(server.everyone)
        ]
        found: dict[int, float] = server.run(tasks)
        server.costs.upload_bytes += np.dtype(np.float64).itemsize * len(found)
        return float(np.max(list(found.values())))  # no number, if one of them is none


def _rows(values: np.ndarray) -> list[list[float | None]]:
    """Return ``[K, n]`` values as JSON can hold them: None for what is no finite number."""
    return [[value if math.isfinite(value) else None for value in row] for row in values.tolist()]

"""The layer game, which selects the layers that can be refined on benign data without losing robustness."""

from __future__ import annotations

import numpy as np

from sylva_ray.core.errors import UserError
from sylva_ray.core.records import GameRecord
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import stack_states
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.layer_game.client import PairedOutcomes
from sylva_ray.federation.stages.layer_game.cost import game_cost, phase1_cost
from sylva_ray.federation.stages.layer_game.rankings.ranking import GamePlan, PlayedGame, Ranking
from sylva_ray.federation.stages.layer_game.server import NOTHING_KEPT, columns, select_layers
from sylva_ray.federation.stages.layer_game.shapley import MAX_EXACT_PLAYERS
from sylva_ray.federation.stages.layer_game.tasks import CandidatesTask, GameOutcome, GameTask
from sylva_ray.federation.stages.stage import Stage, StageResult
from sylva_ray.models.cohort import CohortModel


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
        before = phase1_cost(server.config, server.parameters, server.sizes, num_players - 1)
        is_chain = list(server.players)[:-1] == [f"blocks.{index}" for index in range(num_players - 1)]
        images = [min(phase2.max_images, len(client.selection)) for client in server.fleet.clients]

        def relative_cost(coalitions: np.ndarray) -> float:
            return game_cost(coalitions, images, is_chain) / max(1, before)

        return GamePlan.from_settings(num_players, phase2, rng, relative_cost)

    def run(self, server: Server, step: int) -> StageResult:
        """See `Stage.run`."""
        phase2, everyone = self.phase2, server.everyone
        rng = numpy_generator(server.config.seed, "game", round=step)
        plan = self._plan(server, rng)
        cohorts = server.cohorts(everyone)
        played: dict[int, GameOutcome] = server.run(
            [GameTask(step, cohort, server.stack(cohort), phase2, plan.coalitions, self.ranking) for cohort in cohorts]
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
        phi, width, scores = ranked.phi, ranked.half_width, ranked.scores
        server.game = GameRecord(
            players=list(server.players),
            selection=self.ranking.name,
            shapley=None if phi is None else (phi[:, :, 0] - phi[:, :, 1]).tolist(),
            shapley_benign=None if phi is None else phi[:, :, 0].tolist(),
            shapley_robust=None if phi is None else phi[:, :, 1].tolist(),
            half_width=None if width is None else np.linalg.norm(width, axis=-1).tolist(),
            scores=None if scores is None else scores.tolist(),
            selected=selected.tolist(),
            candidates=[len(np.unique(rows, axis=0)) for rows in candidates],
            coalitions_evaluated=sum(len(outcome.values) for outcome in outcomes),
            block_evaluations=sum(outcome.block_evaluations for outcome in outcomes),
            exact=plan.permutations is None,
            relative_cost=plan.relative_cost,
            sampled_because=(plan.reason or None) if self.ranking.evaluates_coalitions else None,
            **columns([NOTHING_KEPT] * len(everyone), phase2.strengths),
        )
        reported = [outcome.values if outcome.scores is None else outcome.scores for outcome in outcomes]
        server.costs.upload_bytes += sum(values.nbytes for values in reported)
        server.costs.upload_bytes += sum(outcome.num_bytes for outcome in tried.values())
        server.costs.download_bytes += candidates.nbytes + selected.nbytes
        return StageResult()

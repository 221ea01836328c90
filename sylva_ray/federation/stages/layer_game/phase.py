"""Phase 2 as a method names it in the list of its stages."""

from __future__ import annotations

from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.rankings.registry import create_ranking
from sylva_ray.federation.stages.layer_game.refine import Refine
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.federation.stages.stage import Stage


def game_and_refinement(settings: Phase2Parameters) -> list[Stage]:
    """Return the layer game and the refinement of the layers that it selects; no stage if phase 2 is not enabled."""
    return [LayerGame(create_ranking(settings.selection), settings), Refine(settings)] if settings.enabled else []

"""Greedy search: additive games in the order of the worths, and where it differs from the Shapley values."""

from __future__ import annotations

import numpy as np
import pytest

from sylva_ray.config.experiment import LoraSection
from sylva_ray.core.errors import UserError
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.rankings.greedy import GreedyRanking, greedy_order
from sylva_ray.federation.stages.layer_game.shapley import all_coalitions, exact_shapley
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.models.lora import LoraStack


def test_in_an_additive_game_players_enter_by_worth_and_the_harmful_ones_never() -> None:
    worth = np.array([0.1, -0.2, 0.4, 0.0, 0.3])
    assert greedy_order(all_coalitions(5) @ worth).tolist() == [2, 4, 0]


def test_it_does_not_see_that_two_players_win_together() -> None:
    """Two players who are worth something only as a pair: both have Shapley value 1/2, and greedy adds neither."""
    values = all_coalitions(2).all(1).astype(float)
    assert greedy_order(values).tolist() == []
    np.testing.assert_allclose(exact_shapley(values), 0.5)


def test_a_model_with_too_many_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sylva_ray.config.experiment import BackboneSection
    from sylva_ray.models.backbone import create_backbone

    model = LoraStack(create_backbone(BackboneSection(), 5), LoraSection(rank=2))
    game = LayerGame(GreedyRanking(), Phase2Parameters())
    game.check(model)
    monkeypatch.setattr("sylva_ray.federation.stages.layer_game.stage.MAX_EXACT_PLAYERS", 6)
    with pytest.raises(UserError, match="all coalitions of at most 6 layers, and there are 7; use shapley"):
        game.check(model)

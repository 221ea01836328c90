"""Ranking by how little the output of a layer changes under attack: cheap, without a game."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sylva_ray.core.lazy import torch, without_gradients
from sylva_ray.core.types import ParameterStack
from sylva_ray.core.windows import Window, in_windows
from sylva_ray.federation.stages.layer_game.client import Phase2Client, SelectionImages
from sylva_ray.federation.stages.layer_game.rankings.ranking import ScoreRanking


@dataclass(frozen=True)
class ShiftRanking(ScoreRanking):
    """Ranks layers by their relative shift under attack, the smallest first."""

    name: ClassVar[str] = "shift"
    axis: ClassVar[str] = "minus shift under attack"
    caption: ClassVar[str] = (
        "What ranked a layer (row) for a client (column), how little its output moves under attack."
    )
    needs_chain: ClassVar[bool] = True

    def scores(self, player: Phase2Client, benign: ParameterStack, images: SelectionImages) -> np.ndarray:
        """See `ScoreRanking.scores`."""
        del benign
        return -relative_shift(player, images)


@without_gradients
def relative_shift(player: Phase2Client, images: SelectionImages) -> np.ndarray:
    """Return E ||h_l(x') - h_l(x)|| / E ||h_l(x)|| after every block and of the logits, ``[C, n]``."""
    counts = images.counts.tolist()

    def norms(window: Window) -> torch.Tensor:
        part, own = images.part(window), window.select(player.robust)
        return _norms(player, own, part.x, images.against[0][window.rows], part.owner)

    distances, sizes = torch.cat(in_windows(counts, player.model.windows, "forward", norms), dim=2)
    shifts = [
        [float(d.mean() / s.mean()) for d, s in zip(distance.split(counts), size.split(counts), strict=True)]
        for distance, size in zip(distances, sizes, strict=True)
    ]
    return np.array(shifts).T


def _norms(
    player: Phase2Client, params: ParameterStack, x: torch.Tensor, x_adv: torch.Tensor, owner: torch.Tensor
) -> torch.Tensor:
    """Return ||h_l(x') - h_l(x)|| and ||h_l(x)|| of every layer and image, ``[2, n, N]``."""
    clean, moved = player.model.embed(x), player.model.embed(x_adv)
    norms = []

    def record(before: torch.Tensor, after: torch.Tensor) -> None:
        norms.append(torch.stack([(after - before).flatten(1).norm(dim=1), before.flatten(1).norm(dim=1)]))

    assert player.model.num_blocks is not None, "checked before the run"
    for block in range(player.model.num_blocks):
        clean = player.model.run_block(block, params, clean, owner)
        moved = player.model.run_block(block, params, moved, owner)
        record(clean, moved)
    record(*(player.model.classify(params, tokens, owner) for tokens in (clean, moved)))
    return torch.stack(norms, dim=1)

"""Gates between theta^r and theta^b, learned on the selection split: Lorica's forward gating in our form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.stages.layer_game.client import Phase2Client, SelectionImages
from sylva_ray.federation.stages.layer_game.gates import blend, expected_gates, sampled_gates
from sylva_ray.federation.stages.layer_game.rankings.ranking import ScoreRanking

OPEN_GATE = 0.5
"""Layers whose gate is above this are candidates."""


GATE_LR, GATE_PENALTY = 0.05, 1e-3
"""Learning rate of Adam on the gates, and weight of the sum of the gates in the loss (our choice)."""


@dataclass(frozen=True)
class GatesRanking(ScoreRanking):
    """Ranks layers by their gates, the most open one first."""

    name: ClassVar[str] = "gates"
    axis: ClassVar[str] = "gate"
    threshold: ClassVar[float] = OPEN_GATE
    caption: ClassVar[str] = (
        "What ranked a layer (row) for a client (column), its gate: 1 would take the benign end point, 0 "
        "keeps the robust one; only gates above 0.5 are candidates."
    )

    def scores(self, player: Phase2Client, benign: ParameterStack, images: SelectionImages) -> np.ndarray:
        """See `ScoreRanking.scores`."""
        return learned_gates(player, benign, images)


def learned_gates(player: Phase2Client, benign: ParameterStack, images: SelectionImages) -> np.ndarray:
    """Minimise L_benign(alpha) + max(0, L_robust(alpha) - L_robust(0) - tau) + mu |alpha|_1 over each client's gates.

    The optimiser is Adam. The robust loss of an image is the larger one of two fixed adversarial images, made against
    theta^r and theta^b.
    """
    x, against, y, owner, weights = images.x, images.against, images.y, images.owner, images.weights

    def losses(gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = blend(player.robust, benign, gates, player.model.players)
        clean, *attacked = (cross_entropy(player.model.forward(mixed, u, owner), y) for u in (x, *against))
        return images.mean_by_client(clean * weights), images.mean_by_client(torch.maximum(*attacked) * weights)

    shape = (len(player.clients), len(player.model.players))
    log_alpha = x.new_zeros(shape).requires_grad_()
    optimizer = torch.optim.Adam([log_alpha], lr=GATE_LR)
    with torch.no_grad():
        allowed = losses(x.new_zeros(shape))[1] + player.phase2.guard_tolerance
    streams = player.streams("gates")
    for _ in range(player.phase2.gate_steps):
        draw = torch.stack([torch.rand(shape[1], generator=stream) for stream in streams]).to(x)
        gates = sampled_gates(log_alpha, draw)
        benign_loss, robust_loss = losses(gates)
        total = benign_loss + (robust_loss - allowed).clamp(min=0) + GATE_PENALTY * gates.sum(1)
        optimizer.zero_grad()
        (log_alpha.grad,) = torch.autograd.grad(total.sum(), log_alpha)
        optimizer.step()
    return expected_gates(log_alpha.detach()).cpu().numpy()

"""Forward gating: one gate per player between theta^r (0) and theta^b (1), learned while all weights are frozen.

``Delta W(alpha) = s [(1 - alpha) B^r A^r + alpha B^b A^b]`` is exactly the LoRA product of the rank-2r pair ``[(1 -
alpha) B^r, alpha B^b]``, ``[A^r; A^b]``; interpolating A and B separately would be another model. Gates are
hard-concrete variables (Louizos et al. 2018), which reach 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from sylva_ray.core.lazy import torch
from sylva_ray.core.types import ParameterStack
from sylva_ray.models.cohort import broadcast_clients

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
"""The stretch and the temperature of Louizos et al. 2018."""


def blend(
    robust: ParameterStack, benign: ParameterStack, gates: torch.Tensor, players: Mapping[str, tuple[str, ...]]
) -> ParameterStack:
    """Interpolate between two states of C clients, differentiably in the gates.

    Args:
        robust: theta^r, each parameter ``[C, ...]``.
        benign: theta^b, likewise.
        gates: ``[C, n]`` in [0, 1], one per client and player; 0 is theta^r.
        players: ``{player: its parameter names}``, n in all.

    Returns:
        The parameters of the players: adapters of twice the rank, heads of the same shape.
    """
    mixed: ParameterStack = {}
    for player, names in enumerate(players.values()):
        gate = gates[:, player]
        for name in names:
            start, end = robust[name], benign[name]
            alpha = broadcast_clients(gate, start)
            if name.endswith(".lora_A"):
                mixed[name] = torch.cat([start, end], dim=1)
            elif name.endswith(".lora_B"):
                mixed[name] = torch.cat([(1 - alpha) * start, alpha * end], dim=2)
            else:
                mixed[name] = (1 - alpha) * start + alpha * end
    return mixed


def expected_gates(log_alpha: torch.Tensor) -> torch.Tensor:
    """Return the gates without noise, in [0, 1]."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def sampled_gates(log_alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw gates from the hard-concrete distribution; ``uniform`` in (0, 1) has the shape of ``log_alpha``."""
    u = uniform.clamp(1e-6, 1 - 1e-6)
    noisy = (torch.log(u) - torch.log1p(-u) + log_alpha) / TEMPERATURE
    return (torch.sigmoid(noisy) * (HIGH - LOW) + LOW).clamp(0, 1)

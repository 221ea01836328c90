"""Forward gating: a gate per player between theta^r (0) and theta^b (1), learned on images while every weight stays as it
is.

``Delta W(alpha) = s [(1 - alpha) B^r A^r + alpha B^b A^b]`` is exactly the LoRA product of the rank-2r pair ``[(1 - alpha)
B^r, alpha B^b]``, ``[A^r; A^b]``; blending A and B apart would be another model. Gates are hard-concrete variables (Louizos
et al. 2018), which reach 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sylva_ray.core.types import ParameterStack
from sylva_ray.models.cohort import broadcast_clients

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
"""The stretch and the temperature of Louizos et al. 2018."""


def blend(
    robust: ParameterStack, benign: ParameterStack, gates: torch.Tensor, players: Mapping[str, tuple[str, ...]]
) -> ParameterStack:
    """C clients' mixtures, differentiable in ``gates [C, n]``: adapters of twice the rank, heads interpolated."""
    mixed: ParameterStack = {}
    for player, names in enumerate(players.values()):
        gate = gates[:, player]
        for name in names:
            own, other = robust[name], benign[name]
            alpha = broadcast_clients(gate, own)
            if name.endswith(".lora_A"):
                mixed[name] = torch.cat([own, other], dim=1)
            elif name.endswith(".lora_B"):
                mixed[name] = torch.cat([(1 - alpha) * own, alpha * other], dim=2)
            else:
                mixed[name] = (1 - alpha) * own + alpha * other
    return mixed


def expected_gates(log_alpha: torch.Tensor) -> torch.Tensor:
    """The gate without noise, in [0, 1]."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def sampled_gates(log_alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A draw from the hard-concrete distribution; ``uniform`` in (0, 1), like ``log_alpha``."""
    u = uniform.clamp(1e-6, 1 - 1e-6)
    noisy = (torch.log(u) - torch.log1p(-u) + log_alpha) / TEMPERATURE
    return (torch.sigmoid(noisy) * (HIGH - LOW) + LOW).clamp(0, 1)

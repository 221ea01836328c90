"""Small models behind the cohort seam, for attacks: linear ones with closed forms, and a smooth non-linear one."""

from __future__ import annotations

from typing import TypeAlias

import torch

from sylva_ray.core.types import ParameterStack

LinearBatch: TypeAlias = tuple[ParameterStack, torch.Tensor, torch.Tensor, torch.Tensor]
"""Parameters, images, labels and owners."""

SIDE = 4
PIXELS = 3 * SIDE * SIDE


class LinearCohort:
    """Logits W (x - 1/2) + b, a matrix per client."""

    head_names = ("w", "b")
    precision = torch.float32

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nd,ncd->nc", x.flatten(1) - 0.5, params["w"][owner]) + params["b"][owner]


class WavyCohort(LinearCohort):
    """Linear logits with waves on them: gradients turn, and one step is not enough."""

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        z = super().forward(params, x, owner)
        return z + 0.4 * torch.sin(3 * z)


def linear_batch(
    num_classes: int = 2, n: int = 40, clients: int = 2, seed: int = 0, spread: float = 0.2
) -> LinearBatch:
    """Parameters, images well inside [0, 1] (nothing small is clipped), labels that the model gives, owners."""
    g = torch.Generator().manual_seed(seed)
    params = {
        "w": torch.randn(clients, num_classes, PIXELS, generator=g),
        "b": 0.1 * torch.randn(clients, num_classes, generator=g),
    }
    x = 0.5 + spread * (torch.rand(n, 3, SIDE, SIDE, generator=g) * 2 - 1)
    owner = torch.arange(n) * clients // n
    return params, x, LinearCohort().forward(params, x, owner).argmax(1), owner


def gap(
    params: ParameterStack, x: torch.Tensor, y: torch.Tensor, owner: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes: how far the true logit leads ``[N]``, and the difference of the weights ``[N, PIXELS]``."""
    logits = LinearCohort().forward(params, x, owner)
    rows = torch.arange(len(x))
    weights = params["w"][owner]
    return logits[rows, y] - logits[rows, 1 - y], weights[rows, y] - weights[rows, 1 - y]

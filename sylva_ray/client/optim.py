"""Optimisers over a stack of C clients: each client's slice moves exactly as if it were trained alone.

State is elementwise, so it stacks; what does not stack by itself is time. Clients have unequal numbers of batches, so every
client counts its own steps, and a client without data in this step is left untouched: no decay, no momentum drift.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sylva_ray.config import TrainingSection
from sylva_ray.types import ParameterStack


def clip_per_client(gradients: Mapping[str, torch.Tensor], max_norm: float) -> dict[str, torch.Tensor]:
    """Scale each client's gradient to a Euclidean norm of at most ``max_norm`` (`torch.nn.utils.clip_grad_norm_`'s rule)."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    scale_C = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    return {name: g * per_client(scale_C, g) for name, g in gradients.items()}


class StackedOptimizer:
    """AdamW (Loshchilov and Hutter 2019), or SGD with momentum 0.9 and decoupled decay, with `torch.optim`'s arithmetic."""

    BETAS = (0.9, 0.999)
    EPS = 1e-8
    MOMENTUM = 0.9

    def __init__(self, params: ParameterStack, training: TrainingSection, lr: float) -> None:
        self.params, self.lr = params, lr
        self.weight_decay, self.adamw = training.weight_decay, training.optimizer == "adamw"
        first = next(iter(params.values()))
        self.steps_C = torch.zeros(len(first), dtype=torch.float64, device=first.device)
        self.momentum = {name: torch.zeros_like(p) for name, p in params.items()}
        self.second = {name: torch.zeros_like(p) for name, p in params.items()} if self.adamw else {}

    @torch.no_grad()
    def step(
        self,
        gradients: Mapping[str, torch.Tensor],
        active_C: torch.Tensor,
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Move the parameters named in ``gradients`` of the clients in ``active_C [C] bool``, in place.

        ``masks {name: [C] bool}`` further freezes single parameters of single clients, bit for bit."""
        self.steps_C += active_C
        for name, gradient in gradients.items():
            parameter, momentum = self.params[name], self.momentum[name]
            active = per_client(active_C if masks is None else active_C & masks[name], parameter)
            moved = parameter * (1 - self.lr * self.weight_decay)
            if self.adamw:
                beta1, beta2 = self.BETAS
                second = self.second[name]
                new_momentum = torch.lerp(momentum, gradient, 1 - beta1)
                new_second = second * beta2 + (1 - beta2) * gradient * gradient
                correction1 = per_client(1 - beta1**self.steps_C, parameter)
                correction2 = per_client(1 - beta2**self.steps_C, parameter)
                denominator = new_second.sqrt() / correction2.sqrt() + self.EPS
                moved = moved - (self.lr / correction1) * (new_momentum / denominator)
                second.copy_(torch.where(active, new_second, second))
            else:
                new_momentum = self.MOMENTUM * momentum + gradient
                moved = moved - self.lr * new_momentum
            momentum.copy_(torch.where(active, new_momentum, momentum))
            parameter.copy_(torch.where(active, moved, parameter))


def per_client(values_C: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[C]`` shaped and typed to broadcast against ``[C, ...]``."""
    value = values_C if values_C.dtype == torch.bool else values_C.to(like.dtype)
    return value.view(-1, *[1] * (like.ndim - 1))

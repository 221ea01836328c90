"""Optimisers over a stack of C clients: the slice of each client changes exactly as if it were trained alone.

The state of an optimiser is elementwise, so it can be stacked. Clients have unequal numbers of batches, so steps are
counted per client, and a client without data in a step is left unchanged: neither its weights decay nor does its
momentum.
"""

from __future__ import annotations

from collections.abc import Mapping

from sylva_ray.config.experiment import TrainingSection
from sylva_ray.core.lazy import torch, without_gradients
from sylva_ray.core.types import ParameterStack
from sylva_ray.models.cohort import broadcast_clients


def clip_per_client(gradients: Mapping[str, torch.Tensor], max_norm: float) -> dict[str, torch.Tensor]:
    """Scale the gradient of each client to a norm of at most ``max_norm``, as `torch.nn.utils.clip_grad_norm_` does."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    scale_C = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    return {name: g * broadcast_clients(scale_C, g) for name, g in gradients.items()}


class StackedOptimizer:
    """AdamW (Loshchilov and Hutter 2019), or SGD with momentum 0.9 and decoupled decay, as computed by `torch.optim`.

    Args:
        params: of C clients, changed in place.
        training: names the optimiser and its weight decay.
        lr: learning rate.
    """

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

    @without_gradients
    def step(
        self,
        gradients: Mapping[str, torch.Tensor],
        active_C: torch.Tensor,
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Update parameters in place.

        Args:
            gradients: of the parameters to update, ``{name: [C, ...]}``.
            active_C: the clients to update, ``[C] bool``.
            masks: ``{name: [C] bool}``, the parameters of clients that may change; the others keep their bits. None:
                all may.
        """
        self.steps_C += active_C
        beta1, beta2 = self.BETAS
        for name, all_gradients in gradients.items():
            rows = (active_C if masks is None else active_C & masks[name]).nonzero()[:, 0]
            if not len(rows):
                continue
            parameter, momentum, gradient = self.params[name][rows], self.momentum[name][rows], all_gradients[rows]
            parameter.mul_(1 - self.lr * self.weight_decay)
            if self.adamw:
                second = self.second[name][rows]
                momentum.lerp_(gradient, 1 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                correction1 = broadcast_clients(1 - beta1 ** self.steps_C[rows], parameter)
                correction2 = broadcast_clients(1 - beta2 ** self.steps_C[rows], parameter)
                denominator = (second.sqrt() / correction2.sqrt()).add_(self.EPS)
                parameter.sub_((self.lr / correction1) * (momentum / denominator))
                self.second[name][rows] = second
            else:
                momentum.mul_(self.MOMENTUM).add_(gradient)
                parameter.sub_(momentum, alpha=self.lr)
            self.momentum[name][rows] = momentum
            self.params[name][rows] = parameter

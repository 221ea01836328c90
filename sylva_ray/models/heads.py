"""Classifiers that keep the precision of their parameters, whatever the rest of the model computes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ExactLinear(nn.Linear):
    """A linear layer that computes in the precision of its parameters, also under autocast."""

    @classmethod
    def of(cls, linear: nn.Linear) -> ExactLinear:
        """Return the layer that shares the parameters of another one."""
        exact = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        exact.weight, exact.bias = linear.weight, linear.bias
        return exact

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer for rows ``[..., in_features]``."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def keep_head_exact(model: nn.Module, head: str) -> None:
    """Replace the linear layer named ``head`` by an `ExactLinear` with the same parameters."""
    layer = model.get_submodule(head)
    if isinstance(layer, nn.Linear):
        model.set_submodule(head, ExactLinear.of(layer))

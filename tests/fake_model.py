"""A model without a backbone: subclasses define `forward` (and what else a test needs)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.types import ParameterStack


class FakeModel:
    """A `CohortModel` whose head is all of it."""

    head_names: tuple[str, ...] = ("w", "b")
    precision = torch.float32
    kernels = AttentionKernels()
    num_attention_layers = 0
    image_size = 0

    def initial_state(self, rng: torch.Generator) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def trainable(self, name: str) -> bool:
        return name in self.head_names

    def training(self) -> AbstractContextManager[None]:
        return nullcontext()

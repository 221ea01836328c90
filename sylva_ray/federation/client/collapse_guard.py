"""The guard of fast adversarial training: single-step training can collapse within an epoch (Wong et al. 2020, section 5.3).

The tell-tale is a model that resists the single step it was trained on and nothing else: its accuracy under PGD-5 drops at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sylva_ray.attacks.pgd import default_step_size
from sylva_ray.attacks.registry import attack_stack
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ParameterStack, Split
from sylva_ray.federation.client.batches import client_images
from sylva_ray.models.cohort import CohortModel, broadcast_clients

PGD_STEPS = 5
MAX_ACCURACY_DROP = 0.2
"""Accuracy under PGD-5 that an epoch may lose."""


class CollapseGuard:
    """Watches a cohort: after every epoch the clients that collapsed get the state of the epoch before back, and stop.

    Args:
        params: the stack that trains, in place.
        watched: some training images per client (the first batch).
        draws: for their random starts, the same at every look.
    """

    def __init__(
        self,
        model: CohortModel,
        params: ParameterStack,
        watched: Sequence[Split],
        epsilon: float,
        draws: ImageDraws,
    ) -> None:
        first = next(iter(params.values()))
        self.images = client_images(watched, first.dtype, first.device)
        self.draws = draws.to(first.device)
        self.model, self.params = model, params
        self.attack = AttackSpec("pgd", epsilon, PGD_STEPS, default_step_size(epsilon, PGD_STEPS))
        self.stopped_C = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        self._keep(self._accuracy())

    def after_epoch(self) -> None:
        """Roll back and stop who collapsed; remember the others."""
        accuracy_C = self._accuracy()
        self.stopped_C |= accuracy_C < self.accuracy_C - MAX_ACCURACY_DROP
        for name, value in self.params.items():
            value.copy_(torch.where(broadcast_clients(self.stopped_C, value), self.saved[name], value))
        self._keep(torch.where(self.stopped_C, self.accuracy_C, accuracy_C))

    def _keep(self, accuracy_C: torch.Tensor) -> None:
        self.accuracy_C = accuracy_C
        self.saved = {name: value.clone() for name, value in self.params.items()}

    def _accuracy(self) -> torch.Tensor:
        result = attack_stack(self.model, self.params, self.images, self.attack, self.draws)
        return self.images.mean_by_client((result.predictions == self.images.y).double())

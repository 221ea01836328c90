"""The guard of fast adversarial training, which can collapse within an epoch (Wong et al. 2020, section 5.3).

A collapsed model is robust against the single step that it was trained on and against nothing else: its accuracy under
PGD-5 drops suddenly.
"""

from __future__ import annotations

from collections.abc import Sequence

from sylva_ray.attacks.pgd import default_step_size
from sylva_ray.attacks.registry import attack_stack
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ParameterStack, Split
from sylva_ray.federation.client.batches import client_images
from sylva_ray.models.cohort import CohortModel, broadcast_clients

PGD_STEPS = 5
"""Steps of the attack that reveals a collapse."""

MAX_ACCURACY_DROP = 0.2
"""Largest accuracy under PGD-5 that one epoch may lose."""


class CollapseGuard:
    """Undoes the last epoch of clients whose training collapsed, and stops them.

    Args:
        model: of the cohort.
        params: the parameters that are trained, in place.
        watched: some training images of every client (the first batch).
        epsilon: of the training attack, in pixel units.
        draws: for the random starts on these images, the same after every epoch.

    Attributes:
        stopped_C: which clients were stopped, ``[C] bool``.
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
        self._save(self._accuracy())

    def after_epoch(self) -> None:
        """Restore and stop the clients that collapsed in this epoch; save the states of the others."""
        accuracy_C = self._accuracy()
        self.stopped_C |= accuracy_C < self.accuracy_C - MAX_ACCURACY_DROP
        for name, value in self.params.items():
            value.copy_(torch.where(broadcast_clients(self.stopped_C, value), self.saved[name], value))
        self._save(torch.where(self.stopped_C, self.accuracy_C, accuracy_C))

    def _save(self, accuracy_C: torch.Tensor) -> None:
        self.accuracy_C = accuracy_C
        self.saved = {name: value.clone() for name, value in self.params.items()}

    def _accuracy(self) -> torch.Tensor:
        result = attack_stack(self.model, self.params, self.images, self.attack, self.draws)
        return self.images.mean_by_client((result.predictions == self.images.y).double())

"""The task of the mixture: attack every candidate of a client on its selection split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from sylva_ray.aggregation.interpolation import interpolate
from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import torch_dtype
from sylva_ray.core.types import ClientState, ParameterStack, StateStack, stack_states, unstack_states
from sylva_ray.federation.client.batches import split_draws
from sylva_ray.federation.client.outcomes import outcomes
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.parameters import MixtureParameters
from sylva_ray.federation.stages.mixture.choice import Gains, gains_of
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.models.cohort import to_parameters


@dataclass(frozen=True)
class MixtureTask(CohortTask):
    """Compares mixtures of the clients' own models (``states``) and others' with the own ones.

    Attributes:
        partners: the others' models, one stack per partner; there is a candidate for each and every own share.
        names: the parameters that are mixed; the others stay.
        mixture: the settings of the stage.
    """

    partners: tuple[StateStack, ...]
    names: tuple[str, ...]
    mixture: MixtureParameters

    stage: ClassVar[str] = "mixture"

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[Gains]:
        """See `CohortTask`."""
        config, mixture = worker.config, self.mixture
        splits = [own.selection.first(mixture.max_images) for own in worker.data(self)]
        attack = PgdAttack(epsilon=config.reported_epsilon, steps=mixture.attack_steps).spec()
        draws = split_draws(config.seed, f"mixture/{self.step}", self.clients, splits)
        precision = torch_dtype(config.evaluation.precision)
        with worker.stopwatch("mixture"):
            tried = [
                outcomes(worker.model, candidate, splits, attack, draws, precision)
                for candidate in [params, *self._candidates(worker.device)]
            ]
        return [
            gains_of(before, after, split.labels, mixture.balance)
            for (before, *after), split in zip(zip(*tried, strict=True), splits, strict=True)
        ]

    def _candidates(self, device: torch.device) -> Iterator[ParameterStack]:
        own = unstack_states(self.states)
        for partner, share in product(self.partners, self.mixture.own_shares):
            pairs = zip(own, unstack_states(partner), strict=True)
            stack = stack_states([mixed(*pair, self.names, share) for pair in pairs])
            yield to_parameters(stack, device, torch.float32)


def mixed(own: ClientState, partner: ClientState, names: Sequence[str], own_share: float) -> ClientState:
    """Return ``own_share`` of a client's own parameters in ``names`` and the rest of the partner's; others are own."""
    return interpolate(own, partner, names, 1 - own_share)

"""The arguments of the two halves of a method: a batch and its clients, and the uploads of a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import ClientImages, ClientState, ParameterStack
from sylva_ray.core.windows import Window, in_windows, joined, limits_of
from sylva_ray.models.cohort import CohortModel


@dataclass(frozen=True)
class Batch(ClientImages):
    """The images of one training step.

    Attributes:
        active: which clients have images in this step, ``[C] bool``.
        draws: random numbers of every image in this step; streams 0 to 3 are used by this package.
    """

    active: torch.Tensor
    draws: ImageDraws

    @cached_property
    def noise(self) -> torch.Tensor:
        """Uniform in [-1, 1), of the shape of ``x``; for the random starts of attacks."""
        return self.draws.signed(0, self.x.shape[1:]).to(self.x.dtype)

    @cached_property
    def uniforms(self) -> torch.Tensor:
        """Uniform in [0, 1), ``[N, 2]``; for other random numbers of a method."""
        return self.draws.uniform(1, (2,))

    def part(self, window: Window) -> Batch:
        """See `ClientImages.part`."""
        images = super().part(window)
        active, draws = self.active[window.clients], self.draws.select(window.rows)
        return Batch(images.x, images.y, images.owner, images.num_clients, active, draws)


@dataclass(frozen=True)
class ClientContext:
    """What the client half of a method may use.

    Attributes:
        model: of the cohort.
        class_counts: training images per class, ``[C, num_classes]``.
        received: the state that the clients received in this stage.
        stopwatch: ``with context.stopwatch("attack")`` measures the seconds of crafting.
        scratch: for values that a method keeps from one call to the next within one task (one cohort in one stage).
    """

    model: CohortModel
    class_counts: torch.Tensor
    received: ParameterStack
    stopwatch: Stopwatch
    scratch: dict[str, Any] = field(default_factory=dict)

    def in_windows(
        self,
        params: ParameterStack,
        batch: Batch,
        craft: Callable[[ParameterStack, Batch, slice], torch.Tensor],
    ) -> torch.Tensor:
        """Craft images in windows that fit the memory, where the images of a client do not depend on each other.

        Args:
            params: of the cohort.
            batch: N images of the C clients.
            craft: returns the images ``[n, 3, H, W]`` for the parameters of some clients, a part of the batch that they
                own, and its place among the N images.

        Returns:
            ``[N, 3, H, W]``.
        """

        def run(window: Window) -> torch.Tensor:
            return craft(window.select(params), batch.part(window), window.rows)

        return joined(in_windows(batch.counts.tolist(), limits_of(self.model), "attack", run))

    def to_images(self, values_C: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Repeat per-client values ``[C, ...]`` for the images of each client, ``[N, ...]``."""
        return values_C[batch.device_owner]


@dataclass(frozen=True)
class Merge:
    """One merge of a round.

    Attributes:
        members: the clients whose uploads are merged.
        weights: one per member; they sum to 1.
        receiver: the member that gets the result.
    """

    members: Sequence[int]
    weights: np.ndarray
    receiver: int


@dataclass(frozen=True)
class RoundUploads:
    """The uploads of a round, and what else the coordinator knows when they have arrived.

    Attributes:
        round: number of the round, from 1; 0: an exchange before the first round, such as the warm-up's.
        states: the states of all K clients after training. The simulator knows them; only ``by_client`` has been
            uploaded.
        received: the states that the K clients started from, which both ends know.
        by_client: ``{client: state}``, the valid uploads as the coordinator decodes them, some perhaps malicious.
        num_samples: training images of all K clients.
        metrics: ``{client: {name: value}}``, e.g. the mean ``loss``.
        seed: of the experiment, for rules that draw random numbers.
        lora_scale: alpha / rank, with which the products of adapters count in a model.
        run_merges: runs the merges for many receivers elsewhere; None: they run in threads of this process.
    """

    round: int
    states: Sequence[ClientState]
    received: Sequence[ClientState] | Mapping[int, ClientState]
    by_client: Mapping[int, ClientState]
    num_samples: Sequence[int]
    metrics: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    seed: int = 0
    lora_scale: float = 1.0
    run_merges: RunMerges | None = None


RunMerges: TypeAlias = Callable[[RoundUploads, Sequence[str], Sequence[Merge]], list[dict[str, np.ndarray]]]

"""What a method's two halves are given: a batch and its clients, and a round's uploads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import ClientState, ParameterStack
from sylva_ray.models.cohort import CohortModel


@dataclass(frozen=True)
class Batch:
    """``x [N, 3, H, W] in [0, 1]``, ``y [N]``, sorted ``owner [N]`` (on the CPU); ``active [C] bool`` says which clients have
    images in this step. Random numbers from every client's own stream: ``noise`` like x, uniform in [-1, 1], where attacks
    start; ``uniforms [N, 2]``, uniform in [0, 1), for what else a method draws per image."""

    x: torch.Tensor
    y: torch.Tensor
    owner: torch.Tensor
    noise: torch.Tensor
    active: torch.Tensor
    uniforms: torch.Tensor

    def mean_by_client(self, values_N: torch.Tensor) -> torch.Tensor:
        """Mean of per-image values over each client's own images, ``[C]`` (0 for the inactive)."""
        owner = self.owner.to(values_N.device)
        counts = torch.bincount(owner, minlength=len(self.active)).clamp(min=1)
        sums = values_N.new_zeros(len(self.active)).index_add(0, owner, values_N)
        return sums / counts


@dataclass(frozen=True)
class ClientContext:
    """What a client's half may know: the model, its class counts ``[C, num_classes]``, and the state it received.

    ``stopwatch("attack")`` books the seconds spent on crafting. ``scratch`` lasts for one task (one client, one round)."""

    model: CohortModel
    class_counts: torch.Tensor
    received: ParameterStack
    stopwatch: Stopwatch
    scratch: dict[str, Any] = field(default_factory=dict)

    def to_images(self, values_C: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Per-client values ``[C, ...]`` -> per image ``[N, ...]``."""
        return values_C[batch.owner.to(values_C.device)]


@dataclass(frozen=True)
class RoundUploads:
    """What the coordinator holds when a round's uploads are in.

    Attributes:
        round: from 1 (0 is the warm-up).
        states: the K clients' own states after training (the simulator knows them; a method sends only what it declares).
        received: the K states that the clients started from, which both sides know.
        by_client, after the wire: what arrived, decoded, perhaps forged.
        num_samples: training images of all K clients.
        metrics: ``{client: {name: value}}`` that came along, e.g. the mean ``loss``.
        seed: of the experiment, for rules that draw.
    """

    round: int
    states: Sequence[ClientState]
    received: Sequence[ClientState]
    by_client: Mapping[int, ClientState]
    num_samples: Sequence[int]
    metrics: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    seed: int = 0

"""What a method's two halves are given: a batch and its clients, and a round's uploads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import ClientImages, ClientState, ParameterStack
from sylva_ray.models.cohort import CohortModel


@dataclass(frozen=True)
class Batch(ClientImages):
    """The images of one training step, with random numbers from the stream of every client.

    Attributes:
        noise: uniform in [-1, 1], of the shape of ``x``; for the random starts of attacks.
        active: which clients have images in this step, ``[C] bool``.
        uniforms: uniform in [0, 1), ``[N, 2]``; for other random numbers of a method.
    """

    noise: torch.Tensor
    active: torch.Tensor
    uniforms: torch.Tensor


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

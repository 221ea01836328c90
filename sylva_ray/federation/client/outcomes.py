"""Which held-out images of a cohort its models classify correctly, benign and under an attack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sylva_ray.attacks.registry import attack_stack
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ParameterStack, Split
from sylva_ray.federation.client.batches import client_images
from sylva_ray.models.cohort import CohortModel


def outcomes(
    model: CohortModel,
    params: ParameterStack,
    splits: Sequence[Split],
    attack: AttackSpec,
    draws: ImageDraws,
    precision: torch.dtype,
) -> list[np.ndarray]:
    """Classify and attack the images of C clients.

    Args:
        model: of the cohort.
        params: ``{name: [C, ...]}``.
        splits: the images of every client, n_c of client c.
        attack: run anew against every model.
        draws: its random numbers, for all images.
        precision: of the attack; its successes are confirmed in float32.

    Returns:
        ``[2, n_c] bool`` per client: whether its model is right on the benign image, and under the attack.
    """
    first = params[next(iter(params))]
    images = client_images(splits, first.dtype, first.device)
    with torch.no_grad():
        benign = model.forward(params, images.x, images.owner).argmax(1) == images.y
    attacked = attack_stack(model, params, images, attack, draws.to(first.device), precision)
    robust = attacked.predictions == images.y
    return [outcome.T for outcome in images.split_by_client(torch.stack([benign, robust], dim=1))]

"""Which held-out images of a cohort its models classify correctly, benign and under an attack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sylva_ray.attacks.registry import attack_stack
from sylva_ray.attacks.state import predicted_classes
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ParameterStack, Split
from sylva_ray.core.windows import Window, in_windows, limits_of
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
    """Classify and attack the images of C clients, in windows that fit the memory.

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
    first, counts = params[next(iter(params))], [len(split) for split in splits]

    def classify(window: Window) -> torch.Tensor:
        own, pieces = window.select(params), zip(splits[window.clients], window.pieces(counts), strict=True)
        parts = [Split(split.images[rows], split.labels[rows]) for split, rows in pieces]
        images = client_images(parts, first.dtype, first.device)
        with torch.no_grad():
            benign = predicted_classes(model.forward(own, images.x, images.owner)) == images.y
        own_draws = draws.select(torch.arange(window.rows.start, window.rows.stop)).to(first.device)
        robust = attack_stack(model, own, images, attack, own_draws, precision).predictions == images.y
        return torch.stack([benign, robust]).cpu()

    correct = torch.cat(in_windows(counts, limits_of(model), "attack", classify), dim=1).numpy()
    return np.split(correct, np.cumsum(counts)[:-1], axis=1)

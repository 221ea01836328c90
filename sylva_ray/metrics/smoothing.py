"""Randomised smoothing (Cohen et al. 2019, "Certified Adversarial Robustness via Randomized Smoothing"): how often a model
answers what under Gaussian noise. The certificates that follow from it are in `sylva_ray.metrics.certificates`.
"""

from __future__ import annotations

import torch

from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import ParameterStack
from sylva_ray.models.cohort import CohortModel

SELECTION_DRAWS = 100
"""Draws that only guess the class."""


@torch.no_grad()
def votes(
    model: CohortModel,
    params: ParameterStack,
    x: torch.Tensor,
    owner: torch.Tensor,
    sigma: float,
    num_draws: int,
    draws: ImageDraws,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SAMPLEUNDERNOISE of the paper (section 3.2): the class guessed from `SELECTION_DRAWS` draws, and how many of ``num_draws``
    *other* draws answer it, ``[N] int64`` each. With the same draws for both, the certificate would not hold.

    The noisy image is not clipped to [0, 1]: the theorem is about Gaussians."""
    rows = torch.arange(len(x), device=x.device)
    counts = torch.zeros(0)
    for stream_index in range(SELECTION_DRAWS):
        logits = _noisy(model, params, x, owner, sigma, draws, stream_index)
        counts = torch.zeros_like(logits) if stream_index == 0 else counts
        counts[rows, logits.argmax(1)] += 1
    guess = counts.argmax(1)
    hits = torch.zeros_like(guess)
    for stream_index in range(SELECTION_DRAWS, SELECTION_DRAWS + num_draws):
        hits += _noisy(model, params, x, owner, sigma, draws, stream_index).argmax(1) == guess
    return guess, hits


def _noisy(
    model: CohortModel,
    params: ParameterStack,
    x: torch.Tensor,
    owner: torch.Tensor,
    sigma: float,
    draws: ImageDraws,
    stream_index: int,
) -> torch.Tensor:
    return model.forward(params, x + sigma * draws.normal(stream_index, x.shape[1:]), owner)

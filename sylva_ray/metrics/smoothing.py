"""Randomised smoothing: predictions of models under Gaussian noise.

Source: Cohen et al. 2019, "Certified Adversarial Robustness via Randomized Smoothing". The certificates are computed
from these counts in `sylva_ray.metrics.certificates`.
"""

from __future__ import annotations

from sylva_ray.attacks.state import AttackedModel, predicted_classes
from sylva_ray.core.lazy import torch, without_gradients
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import ClientImages, ParameterStack

NUM_SELECTION_DRAWS = 100
"""Number of draws from which the class is selected (n0 in the paper)."""


@without_gradients
def votes(
    model: AttackedModel,
    params: ParameterStack,
    images: ClientImages,
    sigma: float,
    num_draws: int,
    draws: ImageDraws,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count predictions under noise (SAMPLEUNDERNOISE of the paper, section 3.2).

    The noisy images are not clipped to [0, 1], because the theorem holds for Gaussian noise only.

    Args:
        model: the stack of models.
        params: the parameters of the C clients.
        images: the images of the C clients.
        sigma: standard deviation of the noise, in pixel units.
        num_draws: number of draws for the certificate. They are other draws than those that select the class; with the
            same ones, the certificate would not be valid.
        draws: the source of the noise.

    Returns:
        The class ``[N] int64`` selected from `NUM_SELECTION_DRAWS` draws (``num_classes`` where the logits of most are
        NaN), and how many of the ``num_draws`` draws predict it, ``[N] int64``.
    """
    x, owner = images.x, images.owner

    def noisy_logits(stream_index: int) -> torch.Tensor:
        return model.forward(params, x + sigma * draws.normal(stream_index, x.shape[1:]), owner)

    rows = torch.arange(len(x), device=x.device)
    counts = torch.zeros(0)
    for stream_index in range(NUM_SELECTION_DRAWS):
        logits = noisy_logits(stream_index)
        if stream_index == 0:
            counts = logits.new_zeros(len(logits), logits.shape[1] + 1)  # the last column is that of NO_ANSWER
        counts[rows, predicted_classes(logits)] += 1
    guess = counts.argmax(1)
    hits = torch.zeros_like(guess)
    for stream_index in range(NUM_SELECTION_DRAWS, NUM_SELECTION_DRAWS + num_draws):
        hits += predicted_classes(noisy_logits(stream_index)) == guess
    return guess, hits

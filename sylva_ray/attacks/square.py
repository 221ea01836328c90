"""Square Attack (Andriushchenko et al. 2020), L-infinity: random search with squares; needs no gradient, so it finds what
gradient attacks miss where gradients are masked.
"""

from __future__ import annotations

import torch

from sylva_ray.attacks.losses import margin
from sylva_ray.attacks.state import Search
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, at which the share of changed pixels is halved."""


def square(search: Search, spec: AttackSpec, draws: ImageDraws) -> None:
    """``spec.steps`` queries per image; ``p_init`` is the share of pixels that the first squares cover.

    It keeps what is better by however little, so it computes in the model's own precision: in bfloat16 the robust accuracy of
    1,000 images came out 1.5 points too high (`benchmarks/evaluation_precision.py`)."""
    with search.exact():
        _random_search(search, spec, draws)


def _random_search(search: Search, spec: AttackSpec, draws: ImageDraws) -> None:
    epsilon, height, width = spec.epsilon, search.x.shape[2], search.x.shape[3]
    rows = search.alive()
    if not len(rows):
        return
    stripes = _signs(draws.of(rows).uniform(0, (3, 1, width)))
    best = (search.x[rows] + epsilon * stripes).clamp(0, 1)
    best_margin = margin(search.logits(best, rows), search.y[rows])
    for query in range(1, spec.steps):
        keep = search.stands[rows]
        rows, best, best_margin = rows[keep], best[keep], best_margin[keep]
        if not len(rows):
            return
        own = draws.of(rows)
        share = share_of_pixels(query, spec.steps, spec.option("p_init", 0.8))
        side = max(round((share * height * width) ** 0.5), 1)
        side = min(side, height - 1, width - 1)
        window = _windows(own.uniform(2 * query, (2,)), side, height, width)
        colour = 2 * epsilon * _signs(own.uniform(2 * query + 1, (3, 1, 1)))
        x = search.x[rows]
        tried = torch.minimum(torch.maximum(best + window * colour, x - epsilon), x + epsilon).clamp(0, 1)
        value = margin(search.logits(tried, rows), search.y[rows])
        better = value > best_margin
        best = torch.where(better.view(-1, 1, 1, 1), tried, best)
        best_margin = torch.where(better, value, best_margin)


def share_of_pixels(query: int, queries: int, initial: float) -> float:
    """The schedule of the paper, stretched to the number of queries as in its code (AutoAttack's does not stretch it)."""
    scaled = int(query / queries * 10_000)
    return initial / 2 ** sum(scaled > at for at in HALVED_AT)


def _signs(uniform: torch.Tensor) -> torch.Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _windows(uniform: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """``[n, 1, H, W]``: 1 inside a square of this side at a place of every image's own."""
    top = (uniform[:, 0] * (height - side + 1)).long()[:, None]
    left = (uniform[:, 1] * (width - side + 1)).long()[:, None]
    y, x = torch.arange(height, device=top.device), torch.arange(width, device=top.device)
    inside_y = (y >= top) & (y < top + side)
    inside_x = (x >= left) & (x < left + side)
    return (inside_y[:, :, None] & inside_x[:, None, :]).unsqueeze(1).float()

"""Square Attack in L-infinity: random search over square-shaped changes.

Source: Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial attack via random search".
It uses no gradients, so it can succeed where gradient masking defeats gradient attacks.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sylva_ray.attacks.base import LinfAttack, register
from sylva_ray.attacks.losses import margin
from sylva_ray.attacks.state import AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.sections import Count
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, out of 10,000, at which the fraction of changed pixels is halved."""


@register
class SquareAttack(LinfAttack):
    """Settings of Square.

    Attributes:
        queries: per image.
        p_init: fraction of the pixels that the first square covers.
    """

    name: Literal["square"] = "square"
    queries: Count = 5000
    p_init: float = Field(0.8, gt=0, le=1)
    display_name: ClassVar[str] = "Square"
    black_box: ClassVar[bool] = True

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        return AttackSpec(self.name, self.epsilon, self.queries, 0.0, options=self.changed("p_init"))

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Make ``spec.steps`` queries per image.

        Forwards use the precision of the model, because the search compares losses that differ little: with bfloat16
        the measured robust accuracy of 1,000 images was 1.5 points too high (`benchmarks/evaluation_precision.py`).
        """
        with state.at_model_precision():
            _random_search(state, spec.epsilon, spec.steps, cls.option(spec, "p_init"), draws)


def _random_search(state: AttackState, epsilon: float, queries: int, p_init: float, draws: ImageDraws) -> None:
    height, width = state.x.shape[2:]
    rows = state.remaining()
    if not len(rows):
        return
    stripes = _signs(draws.select(rows).uniform(0, (3, 1, width)))
    best = (state.x[rows] + epsilon * stripes).clamp(0, 1)
    best_margin = margin(state.logits(best, rows), state.y[rows])
    for query in range(1, queries):
        keep = state.is_robust[rows]
        rows, best, best_margin = rows[keep], best[keep], best_margin[keep]
        if not len(rows):
            return
        row_draws = draws.select(rows)
        fraction = fraction_of_pixels(query, queries, p_init)
        side = max(round((fraction * height * width) ** 0.5), 1)
        side = min(side, height - 1, width - 1)
        window = _windows(row_draws.uniform(2 * query, (2,)), side, height, width)
        colour = 2 * epsilon * _signs(row_draws.uniform(2 * query + 1, (3, 1, 1)))
        x = state.x[rows]
        candidate = torch.minimum(torch.maximum(best + window * colour, x - epsilon), x + epsilon).clamp(0, 1)
        value = margin(state.logits(candidate, rows), state.y[rows])
        better = value > best_margin
        best = torch.where(better.view(-1, 1, 1, 1), candidate, best)
        best_margin = torch.where(better, value, best_margin)


def fraction_of_pixels(query: int, queries: int, initial: float) -> float:
    """Return the fraction of pixels that a query changes: the schedule of the paper, scaled to ``queries`` in total.

    The scaling is that of the authors' code; AutoAttack does not scale.
    """
    scaled = int(query / queries * 10_000)
    halvings = sum(scaled > at for at in HALVED_AT)
    return initial / float(2**halvings)


def _signs(uniform: torch.Tensor) -> torch.Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _windows(uniform: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """Return masks ``[n, 1, H, W]`` that are 1 inside a square at a random place; ``uniform`` is ``[n, 2]``."""
    top = (uniform[:, 0] * (height - side + 1)).long()[:, None]
    left = (uniform[:, 1] * (width - side + 1)).long()[:, None]
    y, x = torch.arange(height, device=top.device), torch.arange(width, device=top.device)
    inside_y = (y >= top) & (y < top + side)
    inside_x = (x >= left) & (x < left + side)
    return (inside_y[:, :, None] & inside_x[:, None, :]).unsqueeze(1).float()

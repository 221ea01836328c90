"""Attacks that look for the nearest adversarial image: DeepFool (Moosavi-Dezfooli et al. 2016, L2) and SparseFool (Modas et al.
2019, few pixels). They report a distance; with a budget they also report what stands within it. Both compute in the model's own
precision.
"""

from __future__ import annotations

import torch

from sylva_ray.attacks.state import Search
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

CANDIDATES = 10
"""Classes whose boundaries are looked at: the likeliest ones."""
LEAST_MOVE = 1e-4
"""Of a pixel, so that rounding cannot stop the sparse solver at the plane."""


def deepfool(search: Search, spec: AttackSpec, draws: ImageDraws) -> None:
    """At most ``spec.steps`` steps to the nearest linearised boundary; the sum, times 1 + ``overshoot``, is what is tried."""
    del draws
    overshoot = spec.option("overshoot", 0.02)
    rows = search.alive()
    total = torch.zeros_like(search.x[rows])
    with search.exact():
        for _ in range(spec.steps):
            if not len(rows):
                return
            x_adv = (search.x[rows] + (1 + overshoot) * total).clamp(0, 1)
            move, _ = _to_boundary(search, x_adv, rows)
            total = total + move
            x_adv = (search.x[rows] + (1 + overshoot) * total).clamp(0, 1)
            answers = search.logits(x_adv, rows).argmax(1)
            keep = answers == search.y[rows]
            rows, total = rows[keep], total[keep]


def sparsefool(search: Search, spec: AttackSpec, draws: ImageDraws) -> None:
    """At most ``spec.steps`` times: DeepFool's boundary point from where we are, ``reach`` times as far, approached along the
    coordinates that count most. As with the authors, each turn starts where the last one ended, and what is tried is that
    point's way from the image, times 1 + ``overshoot``."""
    del draws
    overshoot, reach = spec.option("overshoot", 0.02), spec.option("reach", 3.0)
    rows = search.alive()
    at = search.x[rows]
    with search.exact():
        for _ in range(spec.steps):
            if not len(rows):
                return
            far, normal = _boundary(search, at, rows)
            at = sparse_step(at, normal, (normal * (reach * far)).flatten(1).sum(1))
            x = search.x[rows]
            answers = search.logits((x + (1 + overshoot) * (at - x)).clamp(0, 1), rows).argmax(1)
            keep = answers == search.y[rows]
            rows, at = rows[keep], at[keep]


def sparse_step(z: torch.Tensor, normal: torch.Tensor, rise: torch.Tensor) -> torch.Tensor:
    """Move as few coordinates as possible so that ``normal . (z' - z) >= rise`` inside [0, 1]: the largest ``|normal|`` first,
    each to its bound, the last one as far as needed."""
    flat, weight = z.flatten(1), normal.flatten(1)
    room = torch.where(weight > 0, 1 - flat, flat) * (weight != 0)
    size, order = weight.abs().sort(dim=1, descending=True)
    room_sorted = room.gather(1, order)
    gain = size * room_sorted
    missing = (rise[:, None] - (gain.cumsum(1) - gain)).clamp(min=0)
    move = torch.minimum(missing / size.clamp(min=1e-12) + (missing > 0) * LEAST_MOVE, room_sorted)
    delta = torch.zeros_like(flat).scatter(1, order, move) * weight.sign()
    return (flat + delta).view_as(z).clamp(0, 1)


def _to_boundary(search: Search, x_adv: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The step to the nearest linearised boundary ``[n, 3, H, W]`` and that boundary's normal, towards the wrong side."""
    logits = search.logits(x_adv, rows, counts=False)
    y = search.y[rows]
    wrong = logits.scatter(1, y[:, None], float("-inf")).topk(min(CANDIDATES, logits.shape[1]) - 1, dim=1).indices
    nearest = torch.full((len(rows),), float("inf"), device=x_adv.device)
    step, normal = torch.zeros_like(x_adv), torch.zeros_like(x_adv)
    for k in range(wrong.shape[1]):
        target = wrong[:, k]

        def ahead(z: torch.Tensor, _: torch.Tensor, target: torch.Tensor = target) -> torch.Tensor:
            return (z.gather(1, target[:, None]) - z.gather(1, y[:, None]))[:, 0]

        value, gradient, _ = search.gradient(x_adv, rows, ahead, counts=False)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        distance = value.abs() / length
        closer = (distance < nearest).view(-1, 1, 1, 1)
        scale = ((value.abs() + 1e-4) / length**2).view(-1, 1, 1, 1)
        step, normal = torch.where(closer, scale * gradient, step), torch.where(closer, gradient, normal)
        nearest = torch.minimum(distance, nearest)
    return step, normal


def _boundary(search: Search, start: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepFool from ``start`` on a path of its own: how far the boundary is, and its normal there."""
    at, far, normal = start, torch.zeros_like(start), torch.zeros_like(start)
    open_rows = torch.ones(len(rows), dtype=torch.bool, device=start.device)
    for _ in range(50):
        chosen = open_rows.nonzero()[:, 0]
        if not len(chosen):
            break
        move, towards = _to_boundary(search, at[chosen], rows[chosen])
        far, normal, at = far.clone(), normal.clone(), at.clone()
        far[chosen] += move
        normal[chosen] = towards
        at[chosen] = start[chosen] + 1.02 * far[chosen]
        answers = search.logits(at[chosen], rows[chosen], counts=False).argmax(1)
        open_rows[chosen] = answers == search.y[rows[chosen]]
    return far, normal

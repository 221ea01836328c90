"""Transfer attacks: images made against one model, answered by another. A fleet's own clients are each other's surrogates."""

from __future__ import annotations

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.norms import LINF
from sylva_ray.attacks.pgd import pgd
from sylva_ray.attacks.state import AttackedModel
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ParameterStack


def transfer(
    model: AttackedModel,
    sources: ParameterStack,
    targets: ParameterStack,
    x: torch.Tensor,
    y: torch.Tensor,
    owner: torch.Tensor,
    spec: AttackSpec,
    draws: ImageDraws,
) -> torch.Tensor:
    """``[N]``: what every owner's target model answers on the last iterate made against its source model.

    The last one alone: the attacker cannot ask the target which iterate fools it."""
    noise = LINF.inside(x, draws, 0)
    sources = {name: value.detach() for name, value in sources.items()}
    x_adv = pgd(lambda u: cross_entropy(model.forward(sources, u, owner), y), x, spec, noise)
    with torch.no_grad():
        return model.forward(targets, x_adv, owner).argmax(1)

"""Transfer attacks: adversarial images of one model are classified by another model."""

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
    """Attack a source model per client and classify the adversarial images with the target model of that client.

    Only the last iterate is classified, because the attacker cannot query the target model.

    Args:
        model: the stack of models.
        sources: parameters of the models that are attacked, ``[C, ...]``.
        targets: parameters of the models that classify, ``[C, ...]``.
        x: images ``[N, 3, H, W]`` in [0, 1].
        y: labels ``[N]``.
        owner: which client owns each image, ``[N]``, sorted, on the CPU.
        spec: the attack; L-infinity PGD with these settings.
        draws: the source of the random start.

    Returns:
        Predictions of the target models ``[N]``.
    """
    noise = LINF.inside(x, draws, 0)
    sources = {name: value.detach() for name, value in sources.items()}
    x_adv = pgd(lambda u: cross_entropy(model.forward(sources, u, owner), y), x, spec, noise)
    with torch.no_grad():
        return model.forward(targets, x_adv, owner).argmax(1)

"""Transfer attacks: adversarial images of one model are classified by another model."""

from __future__ import annotations

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.norms import LINF
from sylva_ray.attacks.pgd import pgd
from sylva_ray.attacks.state import AttackedModel, predicted_classes
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ClientImages, ParameterStack


def transfer(
    model: AttackedModel,
    sources: ParameterStack,
    targets: ParameterStack,
    images: ClientImages,
    spec: AttackSpec,
    draws: ImageDraws,
) -> torch.Tensor:
    """Attack a source model per client and classify the adversarial images with the target model of that client.

    Only the last iterate is classified, because the attacker cannot query the target model.

    Args:
        model: the stack of models.
        sources: parameters of the models that are attacked, ``[C, ...]``.
        targets: parameters of the models that classify, ``[C, ...]``.
        images: the images of the C clients.
        spec: the attack; L-infinity PGD with these settings.
        draws: the source of the random start.

    Returns:
        Predictions of the target models ``[N]``.
    """
    x, y, owner = images.x, images.y, images.owner
    noise = LINF.inside(x, draws, 0)
    sources = {name: value.detach() for name, value in sources.items()}
    x_adv = pgd(lambda u: cross_entropy(model.forward(sources, u, owner), y), x, spec, noise)
    with torch.no_grad():
        return predicted_classes(model.forward(targets, x_adv, owner))

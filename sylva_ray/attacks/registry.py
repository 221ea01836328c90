"""All evaluation attacks by name, AutoAttack's cascade, and what `attack_stack` returns of any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sylva_ray.attacks.apgd import apgd
from sylva_ray.attacks.fab import fab
from sylva_ray.attacks.gradient import descend, noise
from sylva_ray.attacks.nearest import deepfool, sparsefool
from sylva_ray.attacks.square import square
from sylva_ray.attacks.state import Search
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.models.cohort import CohortModel

Attack = Callable[[Search, AttackSpec, ImageDraws], None]


def autoattack(search: Search, spec: AttackSpec, draws: ImageDraws) -> None:
    """The standard ensemble of Croce and Hein (2020) on the survivors of each: APGD-CE, targeted APGD, FAB-T, Square.

    ``spec.steps`` are those of the first three; Square has fifty times as many queries (5,000 for 100). Fewer than four classes
    have no targeted DLR: the untargeted one takes its place, and with two classes APGD on the margin's cross-entropy alone."""
    classes = search.clean.shape[1]
    second = "targeted" if classes >= 4 else "dlr" if classes == 3 else None
    apgd(search, replace(spec, name="apgd", loss="ce", restarts=1), draws)
    if second:
        apgd(search, replace(spec, name="apgd", loss=second, restarts=1), draws)
    fab(search, replace(spec, name="fab", restarts=1), draws)
    square(search, replace(spec, name="square", steps=50 * spec.steps), draws)


ATTACKS: dict[str, Attack] = {
    "noise": noise,
    "fgsm": descend,
    "pgd": descend,
    "mim": descend,
    "cw": descend,
    "apgd": apgd,
    "fab": fab,
    "square": square,
    "autoattack": autoattack,
    "deepfool": deepfool,
    "sparsefool": sparsefool,
}


@dataclass(frozen=True)
class Attacked:
    """Of one attack on N images: ``answers [N]`` (the label where an image stands), ``distance [N]`` (infinite where it does),
    ``x_adv [N, 3, H, W]`` (the image itself where it does), and how many images went forward and backward."""

    answers: torch.Tensor
    distance: torch.Tensor
    x_adv: torch.Tensor
    forwards: int
    backwards: int


def attack_stack(
    model: CohortModel,
    params: ParameterStack,
    x: torch.Tensor,
    y: torch.Tensor,
    owner: torch.Tensor,
    spec: AttackSpec,
    draws: ImageDraws,
    precision: torch.dtype | None = None,
) -> Attacked:
    """Attack a stack of clients at once; see `Search` for the arguments."""
    search = Search(model, params, x, y, owner, spec.epsilon, spec.norm, precision)
    ATTACKS[spec.name](search, spec, draws)
    return Attacked(search.answers, search.distance, search.x_adv, search.forwards, search.backwards)

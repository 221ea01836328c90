"""Imports all attacks of this package; runs an attack on a stack of clients (`attack_stack`); titles of attacks."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

import sylva_ray.attacks
from sylva_ray.attacks.base import ATTACKS
from sylva_ray.attacks.state import AttackedModel, AttackState
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec, ParameterStack

__all__ = ["ATTACKS", "Attacked", "attack_stack", "attack_title"]

for module in pkgutil.iter_modules(sylva_ray.attacks.__path__):  # each module registers its attacks
    importlib.import_module(f"{sylva_ray.attacks.__name__}.{module.name}")


def attack_title(spec: AttackSpec) -> str:
    """Return the title of an attack, or its label if the attack is not registered.

    >>> attack_title(AttackSpec("pgd", 8 / 255, 20, 2 / 255))
    'PGD-20 at epsilon 8/255'
    """
    attack = ATTACKS.get(spec.name)
    return attack.title(spec) if attack else spec.label


@dataclass(frozen=True)
class Attacked:
    """What one attack did to N images.

    Attributes:
        answers: ``[N]``, the wrong class where it succeeded, else the label.
        distance: ``[N]`` of the adversarial image in the attack's norm; infinite where there is none.
        x_adv: ``[N, 3, H, W]``, the adversarial image, else the image itself.
        forwards, backwards: how many images went through the model.
    """

    answers: torch.Tensor
    distance: torch.Tensor
    x_adv: torch.Tensor
    forwards: int
    backwards: int


def attack_stack(
    model: AttackedModel,
    params: ParameterStack,
    x: torch.Tensor,
    y: torch.Tensor,
    owner: torch.Tensor,
    spec: AttackSpec,
    draws: ImageDraws,
    precision: torch.dtype | None = None,
) -> Attacked:
    """Attack a stack of clients at once; see `AttackState` for the arguments."""
    state = AttackState(model, params, x, y, owner, spec.epsilon, spec.norm, precision)
    ATTACKS[spec.name].run(state, spec, draws)
    return Attacked(state.predictions, state.distance, state.x_adv, state.forwards, state.backwards)

"""Imports all attacks of this package; finds an attack by its name; runs it on a stack of clients; titles."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass

import sylva_ray.attacks
from sylva_ray.attacks.base import ATTACKS, Attack
from sylva_ray.attacks.state import AttackedModel, AttackState
from sylva_ray.core.errors import UserError
from sylva_ray.core.lazy import torch
from sylva_ray.core.own_code import find_class
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import ATTACKS_WITHOUT_STEPS, AttackSpec, ClientImages, ParameterStack
from sylva_ray.core.windows import Window, in_windows, joined, limits_of

__all__ = ["ATTACKS", "AttackResult", "attack_stack", "attack_title", "find_attack"]

GROUP = "sylva_ray.attacks"
"""The group of entry points."""

for module in pkgutil.iter_modules(sylva_ray.attacks.__path__):  # each module registers its attacks
    importlib.import_module(f"{sylva_ray.attacks.__name__}.{module.name}")


def find_attack(name: str, key: str = "evaluation.attacks") -> type[Attack]:
    """Return an attack by its name, by ``package.module:Class``, or by an entry point.

    Args:
        name: of the attack.
        key: of the setting, for messages.

    Raises:
        UserError: the name is unknown, or the class cannot be imported.
    """
    attack = find_class(key, name, "attack", ATTACKS, GROUP, Attack)  # type: ignore[type-abstract]
    if not attack.counts_steps:
        ATTACKS_WITHOUT_STEPS.add(name)
    return attack


def attack_title(spec: AttackSpec) -> str:
    """Return the title of an attack, or its label if the attack is not known here.

    >>> attack_title(AttackSpec("pgd", 8 / 255, 20, 2 / 255))
    'PGD-20 at epsilon 8/255'
    """
    try:
        return find_attack(spec.name).title(spec)
    except UserError:  # of a run whose own code is not imported here
        return spec.label


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack on N images.

    Attributes:
        predictions: ``[N]``, the wrong class where the attack succeeded, else the label.
        distance: ``[N]`` of the adversarial image in the norm of the attack; infinite where none was found.
        x_adv: ``[N, 3, H, W]``, the adversarial image, or the image itself where none was found.
        forwards: number of images that were passed forward through the model.
        backwards: number of images that were passed backward through the model.
    """

    predictions: torch.Tensor
    distance: torch.Tensor
    x_adv: torch.Tensor
    forwards: int
    backwards: int


def attack_stack(
    model: AttackedModel,
    params: ParameterStack,
    images: ClientImages,
    spec: AttackSpec,
    draws: ImageDraws,
    precision: torch.dtype | None = None,
) -> AttackResult:
    """Attack the models of C clients at once, in windows that fit the memory.

    Args:
        model: the stack of models.
        params: the parameters of the C clients.
        images: the images of the C clients.
        spec: the attack.
        draws: the source of all random numbers, one key per image.
        precision: floating-point format of the forwards, see `AttackState`.

    Raises:
        UserError: the attack is not known.
    """
    attacker = find_attack(spec.name)

    def attack(window: Window) -> AttackResult:
        own = draws if window.num_images == len(images) else draws.select(_positions(window))
        state = AttackState(model, window.select(params), images.part(window), spec.epsilon, spec.norm, precision)
        attacker.run(state, spec, own)
        return AttackResult(state.predictions, state.distance, state.x_adv, state.forwards, state.backwards)

    return _concatenated(in_windows(images.counts.tolist(), limits_of(model), "attack", attack))


def _positions(window: Window) -> torch.Tensor:
    return torch.arange(window.rows.start, window.rows.stop)


def _concatenated(parts: Sequence[AttackResult]) -> AttackResult:
    """Return the result for all images from those of their windows."""
    return AttackResult(
        joined([part.predictions for part in parts]),
        joined([part.distance for part in parts]),
        joined([part.x_adv for part in parts]),
        sum(part.forwards for part in parts),
        sum(part.backwards for part in parts),
    )

"""What an evaluation measures: attacks on all test images; curves, checks, transfer and gallery on a subset."""

from __future__ import annotations

from dataclasses import dataclass

from sylva_ray.attacks.apgd import ApgdAttack
from sylva_ray.attacks.autoattack import AutoAttack
from sylva_ray.attacks.cw import CwAttack
from sylva_ray.attacks.deepfool import DeepFoolAttack
from sylva_ray.attacks.fab import FabAttack
from sylva_ray.attacks.fgsm import FgsmAttack
from sylva_ray.attacks.mim import MimAttack
from sylva_ray.attacks.noise import NoiseAttack
from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.attacks.sparsefool import SparseFoolAttack
from sylva_ray.attacks.square import SquareAttack
from sylva_ray.core.types import AttackSpec
from sylva_ray.metrics.checks import UNBOUNDED

EPSILONS = tuple(e / 255 for e in (0, 1, 2, 4, 8, 16, 32, 64))
"""Budgets of the curve against epsilon, pixel units."""

STEPS = (1, 5, 10, 20, 50, 100, 200)
"""Steps of the curve against steps."""

RADII = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
"""L2 radii at which certified accuracy is reported."""

SUBSET_IMAGES = 200
"""Images of the whole fleet for the measurements that repeat an attack many times."""

MIN_SUBSET_IMAGES_PER_CLIENT = 8
"""Images that each client has at least among them, as far as its test split goes."""

SUITES = ("quick", "standard", "full")
"""Names of the suites, the smallest first."""

L2_EPSILON = 0.5
"""Budget of the L2 attacks in the suite ``full``, pixel units, whole image."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure.

    Attributes:
        attacks: on all test images.
        epsilon: budget of curves, checks, transfer and gallery, pixel units.
        checks: whether to run the checks S1 to S14.
        curves: whether to measure accuracy against epsilon and against steps.
        transfer: whether to attack every client's model through the others.
        sigmas: noise levels of randomised smoothing, pixel units.
        num_draws: noise draws per image.
        subset_images: images per client of all measurements but ``attacks``.
    """

    attacks: tuple[AttackSpec, ...]
    epsilon: float
    checks: bool = False
    curves: bool = False
    transfer: bool = False
    sigmas: tuple[float, ...] = ()
    num_draws: int = 1000
    subset_images: int = MIN_SUBSET_IMAGES_PER_CLIENT


def subset_images_per_client(num_clients: int) -> int:
    """Return the images per client of the measurements that repeat an attack many times."""
    return max(MIN_SUBSET_IMAGES_PER_CLIENT, -(-SUBSET_IMAGES // num_clients))


def suite(name: str, epsilon: float, num_classes: int) -> tuple[AttackSpec, ...]:
    """Return the attacks of a suite, in the L-infinity ball unless stated otherwise.

    Args:
        name: ``quick``: noise and three gradient attacks. ``standard``: also momentum, PGD with restarts, and
            AutoAttack's standard version. ``full``: also the parts of AutoAttack by themselves, L2, and the nearest
            adversarial images.
        epsilon: budget in the L-infinity ball, pixel units.
        num_classes: of the data; some attacks need at least four.
    """
    quick = (
        NoiseAttack(epsilon=epsilon).spec(),
        FgsmAttack(epsilon=epsilon).spec(),
        PgdAttack(epsilon=epsilon).spec(),
        CwAttack(epsilon=epsilon).spec(),
    )
    if name == "quick":
        return quick
    standard = (
        *quick,
        MimAttack(epsilon=epsilon).spec(),
        PgdAttack(epsilon=epsilon, steps=50, restarts=5).spec(),
        AutoAttack(epsilon=epsilon).spec(),
    )
    if name == "standard":
        return standard
    return (
        *standard,
        ApgdAttack(epsilon=epsilon).spec(),
        *((ApgdAttack(epsilon=epsilon, loss="targeted").spec(),) if num_classes >= 4 else ()),
        FabAttack(epsilon=epsilon).spec(),
        SquareAttack(epsilon=epsilon).spec(),
        PgdAttack(epsilon=L2_EPSILON, norm="l2", steps=50).spec(),
        ApgdAttack(epsilon=L2_EPSILON, norm="l2").spec(),
        DeepFoolAttack().spec(),
        SparseFoolAttack().spec(),
    )


def epsilon_curve() -> tuple[AttackSpec, ...]:
    """Return PGD-20 at growing epsilon, from 0."""
    return tuple(PgdAttack(epsilon=epsilon).spec() for epsilon in EPSILONS)


def steps_curve(epsilon: float) -> tuple[AttackSpec, ...]:
    """Return PGD of growing length, with steps of size 2.5 epsilon / steps."""
    return tuple(PgdAttack(epsilon=epsilon, steps=steps).spec() for steps in STEPS)


def check_attacks(epsilon: float, num_classes: int) -> dict[str, AttackSpec]:
    """Return the attacks that the checks compare, besides those of the two curves, by name."""
    targeted = ApgdAttack(epsilon=epsilon, loss="targeted") if num_classes >= 4 else ApgdAttack(epsilon=epsilon)
    return {
        "unbounded": UNBOUNDED,
        "fgsm": FgsmAttack(epsilon=epsilon).spec(),
        "pgd": PgdAttack(epsilon=epsilon).spec(),
        "restarts": PgdAttack(epsilon=epsilon, restarts=10).spec(),
        "apgd": ApgdAttack(epsilon=epsilon).spec(),
        "targeted": targeted.spec(),
        "square": SquareAttack(epsilon=epsilon, queries=1000).spec(),
        "noise": NoiseAttack(epsilon=epsilon).spec(),
    }


def gallery_attack(epsilon: float) -> AttackSpec:
    """Return the attack of the gallery: FAB, which searches for the nearest adversarial image."""
    return FabAttack(epsilon=epsilon, steps=20, targets=3).spec()


def transfer_attack(epsilon: float) -> AttackSpec:
    """Return the attack on the source model of a transfer."""
    return PgdAttack(epsilon=epsilon, steps=50).spec()

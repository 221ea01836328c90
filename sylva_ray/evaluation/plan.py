"""What one `sylva-ray evaluate` measures: attacks on all test images, and on fewer of them curves, checks, transfer, gallery."""

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
STEPS = (1, 5, 10, 20, 50, 100, 200)
RADII = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
"""L2 radii at which certified accuracy is reported."""

SUBSET_IMAGES = 200
"""Images of the whole fleet for curves and checks, and at least `MIN_SUBSET_IMAGES_PER_CLIENT` of each client."""
MIN_SUBSET_IMAGES_PER_CLIENT = 8

SUITES = ("quick", "standard", "full")


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure. ``attacks`` on every test image; ``epsilon`` is the budget of curves, checks, transfer and gallery."""

    attacks: tuple[AttackSpec, ...]
    epsilon: float
    checks: bool = False
    curves: bool = False
    transfer: bool = False
    sigmas: tuple[float, ...] = ()
    num_draws: int = 1000
    subset_images: int = MIN_SUBSET_IMAGES_PER_CLIENT


def subset_images_per_client(num_clients: int) -> int:
    """Images per client of the measurements that repeat an attack many times."""
    return max(MIN_SUBSET_IMAGES_PER_CLIENT, -(-SUBSET_IMAGES // num_clients))


def suite(name: str, epsilon: float, num_classes: int) -> tuple[AttackSpec, ...]:
    """The attacks of a suite, all in the L-infinity ball but what says otherwise.

    ``quick``: a few gradient attacks. ``standard``: AutoAttack's standard version and more starts of PGD. ``full``: its
        parts by
    themselves, L2, and the nearest adversarial images."""
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
    l2 = 0.5
    return (
        *standard,
        ApgdAttack(epsilon=epsilon).spec(),
        *((ApgdAttack(epsilon=epsilon, loss="targeted").spec(),) if num_classes >= 4 else ()),
        FabAttack(epsilon=epsilon).spec(),
        SquareAttack(epsilon=epsilon).spec(),
        PgdAttack(epsilon=l2, norm="l2", steps=50).spec(),
        ApgdAttack(epsilon=l2, norm="l2").spec(),
        DeepFoolAttack().spec(),
        SparseFoolAttack().spec(),
    )


def epsilon_curve() -> tuple[AttackSpec, ...]:
    """PGD-20 at growing epsilon, 0 included."""
    return tuple(PgdAttack(epsilon=epsilon).spec() for epsilon in EPSILONS)


def steps_curve(epsilon: float) -> tuple[AttackSpec, ...]:
    """PGD of more and more steps, whose size stays 2.5 epsilon / steps."""
    return tuple(PgdAttack(epsilon=epsilon, steps=steps).spec() for steps in STEPS)


def check_attacks(epsilon: float, num_classes: int) -> dict[str, AttackSpec]:
    """What the checks compare, beside the two curves."""
    second = {"loss": "targeted"} if num_classes >= 4 else {}
    return {
        "unbounded": UNBOUNDED,
        "fgsm": FgsmAttack(epsilon=epsilon).spec(),
        "pgd": PgdAttack(epsilon=epsilon).spec(),
        "restarts": PgdAttack(epsilon=epsilon, restarts=10).spec(),
        "apgd": ApgdAttack(epsilon=epsilon).spec(),
        "targeted": ApgdAttack(epsilon=epsilon, **second).spec(),  # type: ignore[arg-type]
        "square": SquareAttack(epsilon=epsilon, queries=1000).spec(),
        "noise": NoiseAttack(epsilon=epsilon).spec(),
    }


def gallery_attack(epsilon: float) -> AttackSpec:
    """FAB, because it looks for the nearest."""
    return FabAttack(epsilon=epsilon, steps=20, targets=3).spec()


def transfer_attack(epsilon: float) -> AttackSpec:
    """PGD-50 on the source."""
    return PgdAttack(epsilon=epsilon, steps=50).spec()

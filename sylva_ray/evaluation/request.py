"""From the command line's words to an `EvaluationRequest`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.config.attacks import check_classes, parse_attack
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.text import did_you_mean
from sylva_ray.evaluation.plan import SUITES, EvaluationRequest, subset_images_per_client, suite


@dataclass(frozen=True)
class Extras:
    """What is asked for beside attacks."""

    checks: bool = False
    curves: bool = False
    transfer: bool = False
    sigmas: tuple[float, ...] = ()


def build_request(
    config: ExperimentConfig,
    attacks: Sequence[str],
    suite_name: str | None,
    epsilon: str | None,
    extras: Extras,
    num_clients: int,
    num_classes: int,
) -> EvaluationRequest:
    """Suite and single attacks together; with neither, the quick suite. ``full`` asks for everything.

    Raises:
        UserError: unknown suite or attack (with the nearest), a budget out of range, too few classes."""
    if suite_name is not None and suite_name not in SUITES:
        hint = did_you_mean(suite_name, SUITES)
        raise UserError("--suite", suite_name, f"unknown suite; {hint}Available: {', '.join(SUITES)}")
    for sigma in extras.sigmas:
        if not 0 < sigma < math.inf:
            raise UserError("--certify", sigma, "must be a number above 0 (pixel units, e.g. 0.1)")
    if extras.transfer and num_clients < 2:
        raise UserError("--transfer", num_clients, "needs at least two clients")
    own = [parse_attack(text) for text in attacks]
    if epsilon is not None:
        budget = build(PgdAttack, {"epsilon": epsilon}, "--epsilon").epsilon
    else:
        trained = [spec for spec in config.evaluation.specs if spec.norm == "linf"]
        asked = [spec for spec in own if spec.norm == "linf"] if suite_name is None else []
        known = [*asked, *trained]
        budget = known[0].epsilon if known else config.attack.epsilon
    if suite_name is None and not attacks:
        suite_name = "quick"
    chosen = [*(suite(suite_name, budget, num_classes) if suite_name else ()), *own]
    if all(math.isinf(spec.epsilon) for spec in chosen):  # the nearest images alone: a worst case needs a budget
        chosen.append(PgdAttack(epsilon=budget).spec())
    everything = suite_name == "full"
    specs = tuple({spec.label: spec for spec in chosen}.values())
    check_classes(specs, num_classes)
    return EvaluationRequest(
        attacks=specs,
        epsilon=budget,
        checks=extras.checks or everything,
        curves=extras.curves or everything,
        transfer=extras.transfer or (everything and num_clients > 1),
        sigmas=extras.sigmas or ((0.12,) if everything else ()),
        subset_images=subset_images_per_client(num_clients),
    )

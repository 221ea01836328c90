"""Convert the options of `sylva-ray evaluate` to an `EvaluationRequest`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.config.attacks import check_classes, check_labels, names_epsilon, parse_attack
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build, parse_value
from sylva_ray.core.errors import UserError
from sylva_ray.core.text import did_you_mean
from sylva_ray.core.types import AttackSpec
from sylva_ray.evaluation.plan import SUITES, EvaluationRequest, subset_images_per_client, suite

DEFAULT_SIGMAS = (0.12,)
"""Noise levels of the suite ``full``, pixel units."""


@dataclass(frozen=True)
class Extras:
    """What to measure besides attacks; see `EvaluationRequest`. With ``surrogates`` there are models of other runs."""

    checks: bool = False
    curves: bool = False
    transfer: bool = False
    sigmas: tuple[float, ...] = ()
    surrogates: bool = False


def build_request(
    config: ExperimentConfig,
    attacks: Sequence[str],
    suite_name: str | None,
    epsilon: str | None,
    extras: Extras,
    num_clients: int,
    num_classes: int,
) -> EvaluationRequest:
    """Build the request for a suite and single attacks; with neither, for ``quick``. ``full`` measures everything.

    Args:
        config: of the run.
        attacks: each ``NAME`` or ``NAME:key=value,...``; one within an L-infinity ball that names no epsilon has
            ``epsilon``.
        suite_name: one of `SUITES`; None: no suite.
        epsilon: budget of suite, curves, checks and attacks that name none, as text; None: that of the first L-infinity
            attack that names one, or else of the run.
        extras: what to measure besides attacks.
        num_clients: of the run.
        num_classes: of the data.

    Raises:
        UserError: an unknown suite or attack (with the nearest name), a budget out of range, too few classes or
            clients.
    """
    check_options(attacks, suite_name, epsilon, extras.sigmas)
    if extras.transfer and num_clients < 2:
        raise UserError("--transfer", num_clients, "needs at least two clients")
    named = [parse_attack(text) for text in attacks if names_epsilon(text)]
    budget = _budget(config, epsilon, named)
    single_attacks = [parse_attack(text, budget) for text in attacks]
    if suite_name is None and not attacks:
        suite_name = "quick"
    specs = [*(suite(suite_name, budget, num_classes) if suite_name else ()), *single_attacks]
    if all(math.isinf(spec.epsilon) for spec in specs):  # a worst case needs an attack with a budget
        specs.append(PgdAttack(epsilon=budget).spec())
    unique_specs = tuple(dict.fromkeys(specs))
    check_labels(unique_specs)
    check_classes(unique_specs, num_classes)
    is_full = suite_name == "full"
    return EvaluationRequest(
        attacks=unique_specs,
        epsilon=budget,
        checks=extras.checks or is_full,
        curves=extras.curves or is_full,
        transfer=extras.transfer or extras.surrogates or (is_full and num_clients > 1),
        sigmas=extras.sigmas or (DEFAULT_SIGMAS if is_full else ()),
        subset_images=subset_images_per_client(num_clients),
    )


def check_options(attacks: Sequence[str], suite_name: str | None, epsilon: str | None, sigmas: Sequence[float]) -> None:
    """Check what is asked for, as far as that needs no run; the arguments are as for `build_request`.

    Raises:
        UserError: an unknown suite or attack, or a budget or a noise level out of range.
    """
    if suite_name is not None and suite_name not in SUITES:
        hint = did_you_mean(suite_name, SUITES)
        raise UserError("--suite", suite_name, f"unknown suite; {hint}Available: {', '.join(SUITES)}")
    for sigma in sigmas:
        if isinstance(sigma, bool) or not isinstance(sigma, Real) or not 0 < sigma < math.inf:
            raise UserError("--certify", sigma, "must be a number above 0 (pixel units, e.g. 0.1)")
    for text in attacks:
        parse_attack(text)
    if epsilon is not None:
        _given_budget(epsilon)


def _given_budget(epsilon: str) -> float:
    try:
        return build(PgdAttack, {"epsilon": parse_value("--epsilon", epsilon)}).epsilon
    except UserError as error:
        raise UserError("--epsilon", error.value, error.fix) from None


def _budget(config: ExperimentConfig, epsilon: str | None, attacks: Sequence[AttackSpec]) -> float:
    """Return ``epsilon``, else the budget of the first L-infinity attack of ``attacks``, of the run, or of training."""
    if epsilon is not None:
        return _given_budget(epsilon)
    specs = (*attacks, *config.evaluation.specs)
    linf = [spec for spec in specs if spec.norm == "linf" and math.isfinite(spec.epsilon)]
    return linf[0].epsilon if linf else config.attack.epsilon

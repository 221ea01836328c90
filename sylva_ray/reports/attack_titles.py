"""Titles of attacks: files refer to an attack by its label, and a run's configuration defines what the label means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sylva_ray.attacks.registry import attack_title
from sylva_ray.config.attacks import EvaluationAttack
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import AttackSpec
from sylva_ray.core.yaml import YamlError, parse_yaml
from sylva_ray.metrics.checks import UNBOUNDED

_ATTACKS: TypeAdapter[list[EvaluationAttack]] = TypeAdapter(list[EvaluationAttack])


def attack_titles(specs: Iterable[AttackSpec]) -> dict[str, str]:
    """Return ``{label: title}`` of the given attacks and of the unbounded attack of check S4."""
    return {spec.label: attack_title(spec) for spec in (*specs, UNBOUNDED)}


def specs_from_config(config: Any) -> tuple[AttackSpec, ...]:
    """Read the evaluation's attacks from a run's configuration.

    Args:
        config: a parsed ``config.yaml``.

    Returns:
        The attacks; empty if they are missing or not valid in this version of the package.
    """
    try:
        return tuple(attack.spec() for attack in _ATTACKS.validate_python(config["evaluation"]["attacks"]))
    except (KeyError, TypeError, ValidationError, UserError):  # UserError: an own attack that is not imported here
        return ()


def attack_titles_from_config(text: str) -> dict[str, str]:
    """Return `attack_titles` of the evaluation's attacks in the text of a ``config.yaml``."""
    try:
        return attack_titles(specs_from_config(parse_yaml(text)))
    except YamlError:
        return attack_titles(())

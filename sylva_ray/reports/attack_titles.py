"""What attacks are called in reports: files name them by label, and a run's configuration says what each of them is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from sylva_ray.attacks.registry import attack_title
from sylva_ray.config.attacks import EvaluationAttack
from sylva_ray.core.types import AttackSpec
from sylva_ray.metrics.checks import UNBOUNDED

_ATTACKS: TypeAdapter[list[EvaluationAttack]] = TypeAdapter(list[EvaluationAttack])


def attack_titles(specs: Iterable[AttackSpec]) -> dict[str, str]:
    """Return ``{label: title}`` of the attacks, and of the unbounded one that check S4 makes."""
    return {spec.label: attack_title(spec) for spec in (*specs, UNBOUNDED)}


def specs_from_config(config: Any) -> tuple[AttackSpec, ...]:
    """Read the evaluation's attacks off a run's config; none where it is missing or today's schema refuses it."""
    try:
        return tuple(attack.spec() for attack in _ATTACKS.validate_python(config["evaluation"]["attacks"]))
    except (KeyError, TypeError, ValidationError):
        return ()


def attack_titles_from_config(text: str) -> dict[str, str]:
    """Return `attack_titles` the attacks in the text of a ``config.yaml``."""
    try:
        return attack_titles(specs_from_config(yaml.safe_load(text)))
    except yaml.YAMLError:
        return attack_titles(())

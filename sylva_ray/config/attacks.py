"""Evaluation attacks in a configuration (``evaluation.attacks``) and on the command line (``--attack NAME:k=v,...``).

Every attack has its own settings, see `sylva_ray.attacks.base.Attack`; `OwnAttack` holds those of the user's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SerializeAsAny, TypeAdapter, model_validator

from sylva_ray.attacks.base import INFINITE, Attack
from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.attacks.registry import ATTACKS, GROUP, find_attack
from sylva_ray.config.schema import build, parse_value
from sylva_ray.core.bounds import MAX_COUNT
from sylva_ray.core.errors import UserError
from sylva_ray.core.own_code import entry_points_of
from sylva_ray.core.sections import Count, Name, OwnName, Section
from sylva_ray.core.text import split_assignment
from sylva_ray.core.types import AttackSpec


class StoredSpec(Section):
    """An `AttackSpec` in a configuration; its ``name`` is that of the attack beside it.

    Attributes:
        epsilon: None: infinite.
        step_size: None: infinite.
    """

    epsilon: float | None = Field(ge=0)
    steps: int = Field(ge=0, le=MAX_COUNT)
    step_size: float | None = Field(ge=0)
    random_start: bool
    restarts: Count
    loss: str
    norm: Literal["linf", "l2", "l0"]
    options: dict[str, float]

    @classmethod
    def of(cls, spec: AttackSpec) -> StoredSpec:
        """Return what a configuration stores of a spec."""
        values = {key: value for key, value in asdict(spec).items() if key != "name"}
        finite = {key: None if value == INFINITE else value for key, value in values.items()}
        return cls.model_validate(finite | {"options": dict(spec.options)})

    def spec(self, name: str) -> AttackSpec:
        """Return the spec of an attack of a name."""
        epsilon, step_size = (INFINITE if value is None else value for value in (self.epsilon, self.step_size))
        options = tuple(self.options.items())
        return AttackSpec(
            name, epsilon, self.steps, step_size, self.random_start, self.restarts, self.loss, self.norm, options
        )


class OwnAttack(Attack):
    """An attack of the user's own, ``package.module:Class``.

    Its settings stay as they were written, and ``resolved`` is what its class made of them. So the configuration of a
    run can be read where the class cannot be imported, and only an attack itself runs code that is not ours.

    Attributes:
        resolved: the attack as workers get it.
    """

    model_config = ConfigDict(extra="allow")

    name: OwnName | Name
    resolved: StoredSpec

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, raw: Any) -> Any:
        key = "evaluation.attacks"
        name = raw.get("name") if isinstance(raw, dict) else None
        if not (isinstance(name, str) and re.fullmatch(r"[\w.:-]{1,200}", name)):
            return raw  # the field says what is wrong with it
        settings = {setting: value for setting, value in raw.items() if setting != "resolved"}
        try:
            attack = find_attack(name, key)
        except UserError:
            if raw.get("resolved") is None:
                raise
            return raw
        return settings | {"resolved": StoredSpec.of(build(attack, settings, key).spec())}

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        return self.resolved.spec(self.name)


def _by_name(value: Any) -> Any:
    """Build the attack that a mapping names; the default is PGD."""
    if isinstance(value, Attack) and not isinstance(value, OwnAttack):
        value = value if value.name in ATTACKS else value.model_dump()
    if isinstance(value, dict):
        value = {"name": PgdAttack.default("name"), **value}
        name = value["name"]
        if isinstance(name, str) and name not in ATTACKS and (":" in name or name in entry_points_of(GROUP)):
            return OwnAttack.model_validate(value)
    if isinstance(value, OwnAttack):
        return value
    return _any_of(tuple(ATTACKS[name] for name in sorted(ATTACKS))).validate_python(value)


@cache
def _any_of(attacks: tuple[type[Attack], ...]) -> TypeAdapter[Attack]:
    union: Any = reduce(or_, attacks)
    return TypeAdapter(Annotated[union, Field(discriminator="name")])


EvaluationAttack = Annotated[SerializeAsAny[Attack], BeforeValidator(_by_name)]
"""Any attack; ``name`` is the discriminator."""


def parse_attack(text: str, epsilon: float | None = None) -> AttackSpec:
    """Parse ``NAME`` or ``NAME:key=value,key=value``, the form of an attack on the command line.

    Args:
        text: ``NAME`` may be ``package.module:Class``.
        epsilon: of an L-infinity attack with a budget which the text does not give, in pixel units; None: its default.

    Raises:
        UserError: the attack or a key is unknown, or a value is out of range.
    """
    name, values = _parsed(text)
    attack = find_attack(name, "--attack")
    prefix = f"--attack {name}"
    field = attack.model_fields.get("epsilon")
    if epsilon is not None and field is not None and "epsilon" not in values:
        spec = None if field.is_required() else build(attack, {"name": name, **values}, prefix).spec()
        if spec is None or (spec.norm == "linf" and math.isfinite(spec.epsilon)):
            values["epsilon"] = epsilon
    return build(attack, {"name": name, **values}, prefix).spec()


def names_epsilon(text: str) -> bool:
    """Return whether the text of an attack, as of `parse_attack`, gives its epsilon.

    Raises:
        UserError: the text is not ``NAME`` or ``NAME:key=value,key=value``.
    """
    return "epsilon" in _parsed(text)[1]


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name of an attack and its settings, which have not been checked."""
    name, rest = _split(text)
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        assignment = split_assignment(part)
        if assignment is None:
            raise UserError("--attack", text, f"{part!r} must be KEY=VALUE, e.g. pgd:steps=100,restarts=5")
        key, value = assignment
        if key in values:
            raise UserError("--attack", text, f"gives {key} twice")
        values[key] = parse_value(f"--attack {name}.{key}", value)
    return name, values


def _split(text: str) -> tuple[str, str]:
    """Split ``NAME:key=value`` and ``package.module:Class:key=value`` into the name and the rest."""
    name, _, rest = text.partition(":")
    attribute, _, settings = rest.partition(":")
    is_own = attribute.isidentifier() and name not in ATTACKS
    return (f"{name}:{attribute}", settings) if is_own else (name, rest)


def check_labels(specs: Sequence[AttackSpec]) -> None:
    """Raise `UserError` if results of two attacks of the command line would have the same name."""
    labels = [spec.label for spec in specs]
    for spec in specs:
        if labels.count(spec.label) > 1:
            names = " and ".join(dict.fromkeys(other.name for other in specs if other.label == spec.label))
            fix = f"is the name of the results of two attacks that differ ({names}); leave one of them out"
            raise UserError("--attack", spec.label, fix)


def check_classes(specs: Sequence[AttackSpec], num_classes: int, key: str = "attack") -> None:
    """Check that the data set has enough classes for every attack.

    Args:
        specs: the attacks.
        num_classes: of the data set.
        key: the setting that they come from.

    Raises:
        UserError: it has fewer than an attack needs, e.g. fewer than three for the DLR.
    """
    for spec in specs:
        attack = find_attack(spec.name)
        if num_classes < attack.min_classes(spec):
            has_loss = "loss" in attack.model_fields
            needs = f"{f'the {spec.loss} loss' if has_loss else attack.display_name} needs at least"
            fix = "; use loss=ce" if has_loss and spec.loss != "ce" else ""
            found = f"{needs} {attack.min_classes(spec)} classes and the data set has {num_classes}{fix}"
            raise UserError(key, spec.label, found)

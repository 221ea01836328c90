"""Evaluation attacks in a configuration (``evaluation.attacks``) and on the command line (``--attack NAME:k=v,...``).

Every attack has its own settings, see `sylva_ray.attacks.base.Attack`; `OwnAttack` holds those of the user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, SerializeAsAny, TypeAdapter, model_validator

from sylva_ray.attacks.base import Attack
from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.attacks.registry import ATTACKS, GROUP, find_attack
from sylva_ray.config.schema import build, parse_value
from sylva_ray.core.errors import UserError
from sylva_ray.core.own_code import entry_points_of
from sylva_ray.core.text import split_assignment
from sylva_ray.core.types import AttackSpec


class OwnAttack(Attack):
    """An attack of the user's own, ``package.module:Class``.

    Its settings stay as they were written, and ``resolved`` is what its class made of them. So the configuration of a
    run can be read where the class cannot be imported, and only an attack itself runs code that is not ours.

    Attributes:
        resolved: the attack as workers get it.
    """

    model_config = ConfigDict(extra="allow")

    resolved: AttackSpec

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, raw: Any) -> Any:
        key = "evaluation.attacks"
        settings = {name: value for name, value in raw.items() if name != "resolved"}
        try:
            attack = find_attack(settings["name"], key)
        except UserError:
            if raw.get("resolved") is None:
                raise
            return raw
        return settings | {"resolved": build(attack, settings, key).spec()}

    def spec(self) -> AttackSpec:
        """See `Attack.spec`."""
        return self.resolved


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


def parse_attack(text: str) -> AttackSpec:
    """Parse ``NAME`` or ``NAME:key=value,key=value``, the form of an attack on the command line.

    ``NAME`` may be ``package.module:Class``.

    Raises:
        UserError: the attack or a key is unknown, or a value is out of range.
    """
    name, rest = _split(text)
    attack = find_attack(name, "--attack")
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        assignment = split_assignment(part)
        if assignment is None:
            raise UserError("--attack", text, f"{part!r} must be KEY=VALUE, e.g. pgd:steps=100,restarts=5")
        key, value = assignment
        if key in values:
            raise UserError("--attack", text, f"gives {key} twice")
        values[key] = parse_value(f"--attack {name}.{key}", value)
    return build(attack, {"name": name, **values}, prefix=f"--attack {name}").spec()


def _split(text: str) -> tuple[str, str]:
    """Split ``NAME:key=value`` and ``package.module:Class:key=value`` into the name and the rest."""
    name, _, rest = text.partition(":")
    attribute, _, settings = rest.partition(":")
    is_own = attribute.isidentifier() and name not in ATTACKS
    return (f"{name}:{attribute}", settings) if is_own else (name, rest)


def check_classes(specs: Sequence[AttackSpec], num_classes: int) -> None:
    """Check that the data set has enough classes for every attack.

    Raises:
        UserError: it has fewer than an attack needs, e.g. fewer than three for the DLR.
    """
    for spec in specs:
        attack = find_attack(spec.name)
        if num_classes < attack.min_classes(spec):
            has_loss = "loss" in attack.model_fields
            needs = f"{f'the {spec.loss} loss' if has_loss else attack.display_name} needs at least"
            fix = "; use loss=ce" if has_loss else ""
            found = f"{needs} {attack.min_classes(spec)} classes and the data set has {num_classes}{fix}"
            raise UserError("attack", spec.label, found)

"""How a user names an evaluation attack: in a config (``evaluation.attacks``), and as ``--attack NAME:k=v,...``.

Every attack has keys of its own (`sylva_ray.attacks.base.Attack`); a key that it does not have is refused, with the
nearest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, TypeAdapter

from sylva_ray.attacks.base import Attack
from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.text import did_you_mean, split_assignment
from sylva_ray.core.types import AttackSpec


def _by_name(value: Any) -> Any:
    """Build the attack that a mapping names among those registered by now; without a name it is PGD."""
    if isinstance(value, dict):
        value = {"name": PgdAttack.default("name"), **value}
    return _any_of(tuple(ATTACKS[name] for name in sorted(ATTACKS))).validate_python(value)


@cache
def _any_of(attacks: tuple[type[Attack], ...]) -> TypeAdapter[Attack]:
    union: Any = reduce(or_, attacks)
    return TypeAdapter(Annotated[union, Field(discriminator="name")])


EvaluationAttack = Annotated[SerializeAsAny[Attack], BeforeValidator(_by_name)]
"""Any registered attack, told apart by ``name``."""


def parse_attack(text: str) -> AttackSpec:
    """Read ``NAME`` or ``NAME:key=value,key=value``, as on the command line.

    Raises:
        UserError: unknown attack or key (with the nearest one), a value out of range.
    """
    name, _, rest = text.partition(":")
    if name not in ATTACKS:
        hint = did_you_mean(name, ATTACKS)
        raise UserError("--attack", text, f"unknown attack; {hint}Known are {', '.join(sorted(ATTACKS))}")
    values: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        assignment = split_assignment(part)
        if assignment is None:
            raise UserError("--attack", text, f"{part!r} must be KEY=VALUE")
        key, value = assignment
        values[key] = value
    return build(ATTACKS[name], values, prefix=f"--attack {name}").spec()


def check_classes(specs: Sequence[AttackSpec], num_classes: int) -> None:
    """Check that the data set has enough classes for every attack's loss.

    Raises:
        UserError: fewer than three for the DLR, four for its targeted form.
    """
    for spec in specs:
        needed = {"dlr": 3, "targeted": 4}.get(spec.loss, 2)
        if num_classes < needed:
            fix = f"the {spec.loss} loss needs {needed} classes and the data set has {num_classes}; use loss=ce"
            raise UserError("attack", spec.label, fix)

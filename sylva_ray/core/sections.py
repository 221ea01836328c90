"""The base of everything that a user sets: a frozen section of YAML that refuses keys it does not have."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def kinds(cls) -> Sequence[type[Section]]:
        """List the sections that may stand where this one is declared: several for a family told apart by ``name``."""
        return [cls]


def parse_fraction(value: Any) -> Any:
    """Accept "8/255" wherever a pixel-unit number is expected."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError("expected a number or a fraction such as 8/255") from error
    return value


PixelUnits = Annotated[float, BeforeValidator(parse_fraction)]

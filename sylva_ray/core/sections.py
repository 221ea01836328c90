"""The base class of configuration sections, and the type of numbers in pixel units."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A frozen section of the configuration that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def kinds(cls) -> Sequence[type[Section]]:
        """Return the valid classes where this one is declared: several for a union discriminated by ``name``."""
        return [cls]


def parse_fraction(value: Any) -> Any:
    """Convert a fraction such as "8/255" to a float; other values are returned unchanged.

    Raises:
        ValueError: a text with a slash is not a fraction.
    """
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError("expected a number or a fraction such as 8/255") from error
    return value


PixelUnits = Annotated[float, BeforeValidator(parse_fraction)]
"""A number in units of the pixel range [0, 1], which may be written as a fraction: 8/255."""

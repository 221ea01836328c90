"""The base class of configuration sections, and the types of their fields.

A section takes values of the declared type only: ``true`` is not 1, ``"3"`` is not a number, and 1.0 is not an integer
(an integer is a number where one is declared). Numbers are finite and within bounds, and texts are short and printable.
Fields that declare no bounds of their own have those of `sylva_ray.core.bounds`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sylva_ray.core.bounds import (
    CHECKED,
    MAX_COUNT,
    MAX_SECONDS,
    MAX_TEXT,
    bounded,
    check_plain,
    check_printable,
)

CONFLICT = "conflict"
"""The type of the errors of `conflict`."""

_FRACTION = re.compile(r"([-+]?[0-9]{1,9}(?:\.[0-9]{1,9})?(?:e-[0-9]{1,2})?)/([0-9]{1,9})")

_SIZE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([kKMGT])(i?)B")


Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
"""A number of rounds, clients, steps, or of anything else that is counted one by one."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""The seed of random draws."""


def parse_size(value: Any) -> Any:
    """Convert a size such as "8 GB" (8e9 bytes) or "8 GiB" (8 x 2^30) to bytes; other values are returned unchanged.

    >>> parse_size("1.5 GB"), parse_size("512MiB"), parse_size(4096)
    (1500000000, 536870912, 4096)

    Raises:
        ValueError: a text is not a size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("expected a size such as 8 GB, 8 GiB or 512 MB, or a number of bytes")
    step = 1024 if match[3] else 1000
    return round(float(match[1]) * step ** ("KMGT".index(match[2].upper()) + 1))


Size = Annotated[int, Field(ge=1, le=2**50), BeforeValidator(parse_size)]
"""A size in bytes, which may be written with a unit: 8 GB, 512 MiB."""

Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
"""A duration, e.g. for which something is waited."""


class Section(BaseModel):
    """A frozen section of the configuration that rejects unknown keys, and whose values are strict and bounded."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = bounded(handler(source))
        return schema

    @model_validator(mode="before")
    @classmethod
    def _complete_by_defaults(cls, raw: Any) -> Any:
        """Complete a section that is given in part by the default of its field, where that has values of its own.

        Lorica's phase 2 is ``Phase2Parameters(selection="gates")``: ``phase2: {gate_steps: 40}`` leaves that as it is.
        """
        if not isinstance(raw, Mapping):
            return raw
        completed = dict(raw)
        for name, field in cls.model_fields.items():
            default, given = field.default, raw.get(name)
            if isinstance(default, Section) and isinstance(given, Mapping) and field.annotation is type(default):
                completed[name] = {**default.model_dump(exclude_defaults=True), **given}
        return completed

    @classmethod
    def kinds(cls) -> Sequence[type[Section]]:
        """Return the valid classes where this one is declared: several for a union discriminated by ``name``."""
        return [cls]


def conflict(key: str, value: object, fix: str) -> PydanticCustomError:
    """Return the error that a check of several settings raises; it becomes a `UserError` about one of them.

    Args:
        key: of the setting, in the section that is checked, or dotted from the top of the configuration.
        value: of the setting.
        fix: what it conflicts with, and what to do.
    """
    return PydanticCustomError(CONFLICT, "{key} = {value}: {fix}", {"key": key, "value": value, "fix": fix})


def _check_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise ValueError("must consist of letters, digits, '.', '_' and '-', because it names a folder")
    return text


Name = Annotated[str, Field(max_length=100), AfterValidator(_check_name)]
"""The name of an experiment or of a sweep, which becomes the name of a folder."""


OwnName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""``package.module:Name``, a part of the user's own (`sylva_ray.core.own_code`)."""


class _Lines:
    """Allows line breaks and tabs in a text."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.str_schema(strict=True, max_length=MAX_TEXT)
        return core_schema.no_info_after_validator_function(self._check, text, metadata={CHECKED: True})

    def _check(self, text: str) -> str:
        check_printable(text.replace("\n", "").replace("\t", ""))
        return text


Lines = Annotated[str, _Lines()]
"""A text of several lines, for what is neither printed in a line nor the name of a file."""


PlainValue = Annotated[Any, AfterValidator(check_plain)]
"""A value that is checked against a schema later; see `check_plain`."""


def parse_fraction(value: Any) -> Any:
    """Convert a fraction such as "8/255" or "2.5/255" to a float; other values are returned unchanged.

    Raises:
        ValueError: a text with a slash is not a fraction.

    >>> parse_fraction("8/255") == 8 / 255, parse_fraction("2.5/255") == 2.5 / 255, parse_fraction(0.1)
    (True, True, 0.1)
    """
    if isinstance(value, str) and "/" in value:
        match = _FRACTION.fullmatch(value.replace(" ", ""))
        if match is None or int(match[2]) == 0:
            raise ValueError("expected a number or a fraction such as 8/255")
        return float(match[1]) / int(match[2])
    return value


PixelUnits = Annotated[float, BeforeValidator(parse_fraction)]
"""A number in units of the pixel range [0, 1], which may be written as a fraction: 8/255."""

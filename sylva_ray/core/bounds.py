"""Strict types and default bounds for whatever is read as a `sylva_ray.core.sections.Section`."""

from __future__ import annotations

from typing import Any

from pydantic_core import core_schema

from sylva_ray.core.text import abbreviated

MAX_INT = 2**31 - 1
"""Bound of integers, positive and negative, for fields without a bound of their own."""

MAX_FLOAT = 3.4e38
"""The same for real numbers: what 32 bits hold, in which most of them are used."""

MAX_TEXT = 4096
"""Characters of a text: as long as a path may be."""

MAX_DEPTH = 32
"""Of lists and mappings inside each other, in values without a schema."""

MAX_COUNT = 1_000_000
"""Bound of what is counted one by one, such as rounds, clients and steps."""

MAX_SECONDS = 31_536_000.0
"""Bound of durations: a year."""


def bounded(schema: Any) -> Any:
    """Make every boolean, number and text of a schema strict, and give bounds to those that have none."""
    if isinstance(schema, list):
        return [bounded(part) for part in schema]
    if not isinstance(schema, dict) or schema.get("metadata", {}).get(CHECKED):
        return schema
    match schema.get("type"):
        case "bool":
            return schema | {"strict": True}
        case "int":
            return _between(schema, -MAX_INT, MAX_INT)
        case "float":
            return _between(schema, -MAX_FLOAT, MAX_FLOAT) | {"allow_inf_nan": False}
        case "str":
            text = {"max_length": MAX_TEXT} | schema | {"strict": True}
            return core_schema.no_info_after_validator_function(check_printable, text, metadata={CHECKED: True})
    return {key: part if key in _NO_SCHEMAS else bounded(part) for key, part in schema.items()}


_NO_SCHEMAS = ("default", "expected", "metadata", "serialization")
"""Keys of a schema under which there are no types of fields."""


def _between(schema: dict[str, Any], low: float, high: float) -> dict[str, Any]:
    """Return the schema of a strict number, with these bounds where it has none."""
    lower = {} if schema.keys() & {"ge", "gt"} else {"ge": low}
    upper = {} if schema.keys() & {"le", "lt"} else {"le": high}
    return schema | lower | upper | {"strict": True}


CHECKED = "sylva_ray_checked"
"""Marks, in the metadata of a schema, a text that has its rule for characters."""


def check_printable(text: str) -> str:
    """Return a text of one line.

    Raises:
        ValueError: it has a line break, another control character, or half of a character.
    """
    if not text.isprintable():
        raise ValueError("must be one line of printable characters")
    return text


def check_plain(value: Any, depth: int = 0) -> Any:
    """Return a value without a schema, if it is one that YAML can hold within the bounds of this module.

    Raises:
        ValueError: it is, or contains, something else: an infinite number, a key that is no text, an object.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"has more than {MAX_DEPTH} lists and mappings inside each other")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"has the key {abbreviated(key, repr)}, which is not a text")
            check_plain(inner, depth + 1)
            check_printable(key)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain(inner, depth + 1)
    else:
        _check_scalar(value)
    return value


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"has a text of more than {MAX_TEXT} characters")
        check_printable(value)
    elif isinstance(value, int | float):
        if not abs(value) <= MAX_FLOAT:  # also not a number
            raise ValueError(f"has a number that is not finite or beyond {MAX_FLOAT:g}")
    elif value is not None:
        raise ValueError(f"{value!s} is not a number, a text, a list or a mapping")

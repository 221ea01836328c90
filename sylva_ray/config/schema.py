"""Reading of YAML files, ``KEY=VALUE`` overrides, and validation with errors of one line.

`build` converts the first problem to a `UserError` that names the dotted key, its value and what is allowed, and
suggests the most similar key if a key is misspelt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import Section
from sylva_ray.core.text import did_you_mean, split_assignment

RawConfig: TypeAlias = dict[str, Any]
"""A mapping as read from YAML, before validation."""

T = TypeVar("T", bound=BaseModel)


def read_overridden(path: str | Path, overrides: Sequence[str] = ()) -> RawConfig:
    """Read a YAML mapping and apply ``KEY=VALUE`` overrides.

    Raises:
        UserError: see `read_yaml` and `overridden`.
    """
    return overridden(read_yaml(path), overrides)


def overridden(raw: RawConfig, overrides: Sequence[str]) -> RawConfig:
    """Apply ``KEY=VALUE`` overrides to a mapping, in place, and return it.

    Raises:
        UserError: an override is not ``KEY=VALUE``, or a section in its key is a value in the mapping.
    """
    for override in overrides:
        set_dotted(raw, *parse_override(override))
    return raw


def read_yaml(path: str | Path) -> RawConfig:
    """Read a YAML mapping; an empty file is an empty mapping.

    Raises:
        UserError: the file does not exist, cannot be read, is not valid YAML, or is not a mapping.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError("file", str(path), "no such file; example configurations are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("file", str(path), f"cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: looks like a date but is not one
        raise UserError("file", str(path), f"is not valid YAML ({' '.join(str(error).split())})") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError("file", str(path), "must be a mapping of sections such as dataset: and training:")
    return raw


def build(schema: type[T], raw: Any, prefix: str = "") -> T:
    """Validate ``raw`` with ``schema``.

    Args:
        schema: a pydantic model.
        raw: the data, usually a `RawConfig`.
        prefix: where ``raw`` is in the configuration, for error messages.

    Raises:
        UserError: the first problem, with the dotted key, its value and what is allowed.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise _to_user_error(schema, error, prefix) from None


def _to_user_error(schema: type[BaseModel], error: ValidationError, prefix: str) -> UserError:
    problem = _closest(error)
    location = [str(part) for part in problem["loc"] if not _is_alternative(part)]
    named, _ = _follow(schema, location)
    key = ".".join([prefix, *named] if prefix else named) or "config"
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        _, section = _follow(schema, location[:-1])
        allowed = list(section.model_fields) if section else []
        hint = did_you_mean(location[-1], allowed)
        return UserError(key, value, f"unknown key; {hint}Available: {', '.join(allowed)}")
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        expected = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
        hint = did_you_mean(str(context["tag"]), expected)
        return UserError(f"{key}.name", context["tag"], f"is not known; {hint}Available: {', '.join(expected)}")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return UserError(key, value, "must be a section with keys of its own")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(value, dict):  # a check of several keys, which names them itself
        assignment, _, rest = message.partition(" ")
        name, equals, given = assignment.partition("=")
        if not equals:
            return UserError(key, _abbreviated(value), message)
        return UserError(name if "." in name or key == "config" else f"{key}.{name}", yaml.safe_load(given), rest)
    description, _, _ = message.partition(", unable to parse")
    return UserError(key, value, description.replace("Input should be", "must be"))


def _abbreviated(section: RawConfig) -> RawConfig:
    """Replace the values of a section by dots, because an error message is one line."""
    return dict.fromkeys(section, ...)


def _closest(error: ValidationError) -> ErrorDetails:
    """Return the first problem; of the alternatives of a union, the one with the longest location."""
    first, *others = error.errors()
    if not _is_alternative(first["loc"][-1] if first["loc"] else ""):
        return first
    field = first["loc"][:-1]
    return max(
        [first, *(other for other in others if other["loc"][: len(field)] == field)], key=lambda e: len(e["loc"])
    )


def _is_alternative(part: int | str) -> bool:
    """Return whether a part of a location is an alternative of a union: a type or a class, not a key."""
    return part in ("int", "float", "str") or "literal" in str(part) or str(part)[:1].isupper()


def _follow(schema: type[BaseModel], location: Sequence[str]) -> tuple[list[str], type[BaseModel] | None]:
    """Return the parts of a location that are keys of the YAML file (tags of unions are not), and the section there."""
    sections, named = [schema], []
    for part in location:
        if len(sections) > 1 and not part.isdigit():
            sections = [section for section in sections if section.model_fields["name"].default == part]
            continue
        named.append(part)
        if not part.isdigit():
            fields = sections[0].model_fields if sections else {}
            sections = _sections_in(fields[part].annotation) if part in fields else []
    return named, sections[0] if len(sections) == 1 else None


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections in a type such as ``X``, ``X | None``, ``tuple[X, ...]`` or ``tuple[A | B, ...]``."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, Section):
            return list(annotation.kinds())
        return [annotation] if issubclass(annotation, BaseModel) else []
    inner = () if get_origin(annotation) is Literal else get_args(annotation)
    return [section for part in inner for section in _sections_in(part)]


def parse_override(override: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``: a dotted key, and a value in YAML or, if it is not valid YAML, a text.

    Raises:
        UserError: the text is not ``KEY=VALUE``.
    """
    parts = split_assignment(override)
    if parts is None:
        raise UserError("override", override, "must be KEY=VALUE with a dotted key, e.g. partition.num_clients=50")
    key, text = parts
    try:
        return key, yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return key, text


def set_dotted(raw: RawConfig, key: str, value: Any) -> None:
    """Set a dotted key to ``value`` and create missing sections.

    Raises:
        UserError: a section in the key is a value in the mapping.
    """
    node = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(key, value, f"{parent!r} is a value, not a section")
        node = child
    node[leaf] = value


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Convert a nested mapping to ``{dotted key: value as text}``."""
    if isinstance(tree, dict):
        flat: dict[str, str] = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(tree) if isinstance(tree, list) else str(tree)}

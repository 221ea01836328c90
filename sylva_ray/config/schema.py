"""Pages of YAML that become frozen, checked objects; and errors that are one line.

`build` turns the first problem into a `UserError` that names the dotted key, its value and what is allowed, with the
nearest key where one was misspelt. The objects are `sylva_ray.core.sections.Section`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import Section
from sylva_ray.core.text import did_you_mean, split_assignment

T = TypeVar("T", bound=BaseModel)


def read_overridden(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with ``KEY=VALUE`` overrides applied, not yet validated."""
    return overridden(read_yaml(path), overrides)


def overridden(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``KEY=VALUE`` overrides to a mapping, in place, and return it.

    Raises:
        UserError: an override is not ``KEY=VALUE``, or its key leads through a value.
    """
    for override in overrides:
        set_dotted(raw, *parse_override(override))
    return raw


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError("config", str(path), "no such file; the ones that ship are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("config", str(path), f"cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        raise UserError("config", str(path), f"is not valid YAML ({' '.join(str(error).split())})") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError("config", str(path), "must hold a mapping of sections such as `dataset:` and `training:`")
    return raw


def build(schema: type[T], raw: Any, prefix: str = "") -> T:
    """Validate ``raw`` against ``schema``; the first problem becomes one readable line.

    Raises:
        UserError: names the dotted key, the value and what is allowed.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise _readable(schema, error, prefix) from None


def _readable(schema: type[BaseModel], error: ValidationError, prefix: str) -> UserError:
    problem = _closest(error)
    kept = [part for part in problem["loc"] if not _is_alternative(part)]
    location = [str(part) for part in kept]
    named, _ = _follow(schema, location)
    key = ".".join([prefix, *named] if prefix else named) or "config"
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        _, section = _follow(schema, location[:-1])
        allowed = list(section.model_fields) if section else []
        hint = did_you_mean(location[-1], allowed)
        return UserError(key, value, f"unknown key; {hint}Allowed here: {', '.join(allowed)}")
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        expected = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
        hint = did_you_mean(str(context["tag"]), expected)
        return UserError(f"{key}.name", context["tag"], f"is not known; {hint}Known are {', '.join(expected)}")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(value, dict):  # a check across keys names them itself
        first, _, rest = message.partition(" ")
        name, _, found = first.partition("=")
        return UserError(name, found or "see the other key", rest) if "." in name else UserError(key, "...", message)
    description = message[0].lower() + message[1:]
    return UserError(key, value, description.replace("input should be", "must be"))


def _closest(error: ValidationError) -> ErrorDetails:
    """The first problem; where it is an alternative of a union, the one that got furthest into what was given."""
    first, *others = error.errors()
    if not _is_alternative(first["loc"][-1] if first["loc"] else ""):
        return first
    field = first["loc"][:-1]
    return max(
        [first, *(other for other in others if other["loc"][: len(field)] == field)], key=lambda e: len(e["loc"])
    )


def _is_alternative(part: int | str) -> bool:
    """Whether a part of a location names an alternative of a union (keys are in lower case, sections' classes are not)."""
    return part in ("int", "float", "str") or "literal" in str(part) or str(part)[:1].isupper()


def _follow(schema: type[BaseModel], location: Sequence[str]) -> tuple[list[str], type[BaseModel] | None]:
    """The parts of a location that stand in the YAML (the tag of a union does not), and the section that it leads to."""
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
    """The section in ``X``, ``X | None`` or ``tuple[X, ...]``; all of them in ``tuple[A | B, ...]``."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, Section):
            return list(annotation.kinds())
        return [annotation] if issubclass(annotation, BaseModel) else []
    inner = () if get_origin(annotation) is Literal else get_args(annotation)
    return [section for part in inner for section in _sections_in(part)]


def parse_override(override: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``: a dotted key and a value in YAML; what is not YAML is a text.

    Raises:
        UserError: it is not ``KEY=VALUE``.
    """
    parts = split_assignment(override)
    if parts is None:
        raise UserError("override", override, "must be KEY=VALUE with a dotted key, e.g. partition.num_clients=50")
    key, text = parts
    try:
        return key, yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return key, text


def set_dotted(raw: dict[str, Any], key: str, value: Any) -> None:
    """Put ``value`` under a dotted key, making the sections on the way.

    Raises:
        UserError: the way leads through a value.
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
    """``{dotted key: value as text}``."""
    if isinstance(tree, dict):
        flat: dict[str, str] = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(tree) if isinstance(tree, list) else str(tree)}

"""Reading of YAML files, ``KEY=VALUE`` overrides, and validation with errors of one line.

`build` converts the first problem to a `UserError` that names the dotted key, its value and what is allowed, and
suggests the most similar key if a key is misspelt.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sylva_ray.core.bounds import MAX_DEPTH
from sylva_ray.core.errors import UserError
from sylva_ray.core.files import read_text_file
from sylva_ray.core.locations import local_path
from sylva_ray.core.sections import CONFLICT, Section
from sylva_ray.core.text import BUDGETS, did_you_mean, split_assignment
from sylva_ray.core.yaml import EmptyYamlError, YamlError, parse_scalar, parse_yaml

RawConfig: TypeAlias = dict[str, Any]
"""A mapping as read from YAML, before validation."""

T = TypeVar("T", bound=BaseModel)


def read_overridden(path: str | Path, overrides: Sequence[str] = (), kind: FileKind | None = None) -> RawConfig:
    """Read a YAML mapping and apply ``KEY=VALUE`` overrides.

    Args:
        path: of the file.
        overrides: to apply.
        kind: of the file, for messages; None: `CONFIG_FILE`.

    Raises:
        UserError: see `read_yaml` and `overridden`.
    """
    return overridden(read_yaml(path, kind or CONFIG_FILE), overrides)


def overridden(raw: RawConfig, overrides: Sequence[str]) -> RawConfig:
    """Apply ``KEY=VALUE`` overrides to a mapping, in place, and return it.

    Raises:
        UserError: an override is not ``KEY=VALUE``, or a section in its key is a value in the mapping.
    """
    for override in overrides:
        set_dotted(raw, *parse_override(override))
    return raw


class FileKind(NamedTuple):
    """What messages say about files of one kind.

    Attributes:
        example: where there are files of this kind, or what such a file is.
        smallest: the least that must be in one.
        sections: two of its keys.
    """

    example: str
    smallest: str
    sections: str


CONFIG_FILE = FileKind(
    example="`sylva-ray list recipes` has examples",
    smallest="it has no setting. The smallest config is `dataset: {name: digits}`",
    sections="dataset: and training:",
)
"""Experiments and pre-trainings."""


def read_yaml(path: str | Path, kind: FileKind = CONFIG_FILE) -> RawConfig:
    """Read a YAML mapping.

    Args:
        path: of the file.
        kind: what it is, for messages.

    Raises:
        UserError: the file does not exist or cannot be read, is empty, is not valid YAML (see `sylva_ray.core.yaml`),
            or is not a mapping.
    """
    text = read_text_file(local_path("file", path), f"no such file; {kind.example}")
    try:
        raw = parse_yaml(text)
    except EmptyYamlError:
        raise UserError("file", str(path), f"is empty or damaged: {kind.smallest}") from None
    except YamlError as error:
        raise UserError("file", str(path), f"is not valid YAML ({error})") from None
    if not isinstance(raw, dict):
        raise UserError("file", str(path), f"must be a mapping with keys such as {kind.sections}")
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
        raise _to_user_error(schema, raw, error, prefix) from None
    except RecursionError:
        raise UserError(
            prefix or "config", type(raw).__name__, "has mappings or lists inside each other without end"
        ) from None


NEAR = 0.85
"""Similarity in [0, 1] from which a misspelt key of a section comes before keys of that very name elsewhere."""

_MESSAGES = {
    "bool_type": "must be true or false",
    "invalid_key": "must be a name: the keys of a section are texts",
    "dict_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
    "model_type": "must be a section with keys of its own",
    "string_type": "must be a text; write it in quotes",
    "tuple_type": "must be a list",
}
"""Messages for the types of problems that pydantic describes in the words of Python."""


def _to_user_error(schema: type[BaseModel], raw: Any, error: ValidationError, prefix: str) -> UserError:
    problem = _closest(raw, error)
    parts = _parts(raw, problem)
    section = _section_at(schema, parts[:-1])
    if parts and section is not None and parts[-1][0] in section.model_fields:  # a default may be wrong, too
        parts[-1] = parts[-1][0], True
    named = [str(part) for part, is_key in parts if is_key]
    key = ".".join([prefix, *named] if prefix else named) or "config"
    value, kind = problem["input"], problem["type"]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # a section that a class of the user's own checked
        return cause
    if kind == "extra_forbidden":
        allowed = list(section.model_fields) if section else []
        name, colon, rest = named[-1].partition(":")
        if colon and value is None and name in allowed:
            return UserError(key, value, f"needs a blank after the colon: write {name}: {rest}")
        elsewhere = [f"{prefix}.{found}" if prefix else found for found in keys_named(schema, name)]
        near = difflib.get_close_matches(name, allowed, n=1, cutoff=NEAR) if elsewhere else []
        likely = [".".join([*key.split(".")[:-1], other]) for other in near] + elsewhere
        hint = f"did you mean {' or '.join(map(repr, likely))}? " if likely else did_you_mean(name, allowed)
        return UserError(key, value, f"unknown key; {hint}Available: {', '.join(allowed)}")
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        expected = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
        hint = did_you_mean(str(context["tag"]), expected)
        return UserError(f"{key}.name", context["tag"], f"is not known; {hint}Available: {', '.join(expected)}")
    if kind == CONFLICT:
        name, is_absolute = problem["ctx"]["key"], "." in problem["ctx"]["key"] or key == "config"
        return UserError(name if is_absolute else f"{key}.{name}", problem["ctx"]["value"], problem["ctx"]["fix"])
    if kind == "missing":
        return UserError(key, None, "is missing, and must be given")
    if kind in _MESSAGES:
        return UserError(key, value, _MESSAGES[kind] + _example(key, value, kind, _sections_at(schema, parts)))
    return UserError(key, value, _fix_of_value(key, value, problem) + _or_else(raw, problem, error))


def _fix_of_value(key: str, value: Any, problem: ErrorDetails) -> str:
    """Return what is allowed where a value is of the wrong kind or outside its bounds."""
    kind = problem["type"]
    if value == "" and kind.startswith(("float", "int", "bool")):
        return "is empty: write a value after the equals sign, or leave the setting out"
    if kind in ("float_type", "float_parsing") and key.endswith(BUDGETS):
        return "must be a number or a fraction such as 4/255"
    if kind == "less_than_equal" and key.endswith(BUDGETS):
        return "must be at most 1, in units of the pixel range [0, 1]: 8/255, not 8"
    message = re.sub("^(Value error|Assertion failed), *", "", problem["msg"])
    description = re.sub("( after validation, not .*|, unable to parse.*)$", "", message)
    return re.sub(r"^\w+ should", "must", description) or "is not valid"


def _example(key: str, value: Any, kind: str, sections: Sequence[type[BaseModel]]) -> str:
    """Return how to write what was meant where a section or a list is missing, as the end of a message."""
    is_word = isinstance(value, str) and value.isidentifier()
    if kind == "tuple_type":
        if is_word:
            return f": write [{f'{{name: {value}}}' if sections else value}]"
        return ", e.g. [a, b]; a single entry can be set only in a list that the file has"
    if kind not in ("dict_type", "model_attributes_type", "model_type"):
        return ""
    if value is None and len(sections) == 1 and "enabled" in sections[0].model_fields:
        return f"; to leave it out: {key}.enabled=false"
    chosen_by = next((name for name in ("name", "kind") if any(name in s.model_fields for s in sections)), None)
    return f", e.g. {{{chosen_by}: {value}}}" if is_word and chosen_by else ""


def _or_else(raw: Any, problem: ErrorDetails, error: ValidationError) -> str:
    """Return what else is allowed where a value may be of several kinds, and what a misspelt word may have meant."""
    parts, field = _parts(raw, problem), problem["loc"][:-1]
    others = [] if not parts or parts[-1][1] else [e for e in error.errors() if e["loc"][:-1] == field and e != problem]
    fixes = [_ALTERNATIVES.get(other["type"]) or _fix_of_value("", None, other) for other in others]
    more = "".join(f", or {fix.removeprefix('must be ').removeprefix('a valid ')}" for fix in dict.fromkeys(fixes))
    known = re.findall(r"'([^']+)'", " ".join(str(e["ctx"]["expected"]) for e in [problem, *others] if _is_word(e)))
    hint = did_you_mean(problem["input"], known) if isinstance(problem["input"], str) else ""
    return f"{more}; {hint.strip()}" if hint else more


def _is_word(problem: ErrorDetails) -> bool:
    return problem["type"] == "literal_error"


_ALTERNATIVES = {"string_pattern_mismatch": "package.module:name", "model_type": "a section with keys of its own"}
"""What is allowed where a value is none of the words that are."""


def _closest(raw: Any, error: ValidationError) -> ErrorDetails:
    """Return the first problem; of the alternatives of a union, the one with the longest location."""
    first, *others = error.errors()
    parts = _parts(raw, first)
    if not parts or parts[-1][1]:
        return first
    field = first["loc"][:-1]
    return max(
        [first, *(other for other in others if other["loc"][: len(field)] == field)], key=lambda e: len(e["loc"])
    )


def _parts(raw: Any, problem: ErrorDetails) -> list[tuple[int | str, bool]]:
    """Return the parts of a problem's location, and whether each is a key of ``raw``, not an alternative of a union."""
    location, node, parts = problem["loc"], raw, []
    for place, part in enumerate(location, 1):
        is_index = isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)
        is_key = is_index or (isinstance(node, Mapping) and part in node)
        node = node[part] if is_key else node
        parts.append((part, is_key or (problem["type"] == "missing" and place == len(location))))
    return parts


def _section_at(schema: type[BaseModel], parts: Sequence[tuple[int | str, bool]]) -> type[BaseModel] | None:
    """Return the section at a location, if the location decides it."""
    sections = _sections_at(schema, parts)
    return sections[0] if len(sections) == 1 else None


def _sections_at(schema: type[BaseModel], parts: Sequence[tuple[int | str, bool]]) -> list[type[BaseModel]]:
    """Return the sections that may be at a location."""
    sections = [schema]
    for part, is_key in parts:
        if not is_key:
            sections = [other for other in sections if _name_of(other) == part] if len(sections) > 1 else sections
        elif not isinstance(part, int):
            fields = sections[0].model_fields if sections else {}
            sections = _sections_in(fields[part].annotation) if part in fields else []
    return sections


def _name_of(section: type[BaseModel]) -> Any:
    """Return the ``name`` by which a section is chosen in a union."""
    field = section.model_fields.get("name")
    return field.default if field else None


def keys_named(schema: type[BaseModel], name: str) -> Iterator[str]:
    """Yield the dotted keys of all settings and sections of this name in a schema, but for those inside lists.

    >>> from sylva_ray.config.experiment import ExperimentConfig
    >>> list(keys_named(ExperimentConfig, "rounds"))
    ['training.rounds']
    """
    for field, info in schema.model_fields.items():
        if field == name:
            yield field
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from (f"{field}.{key}" for key in keys_named(info.annotation, name))


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections in a type such as ``X``, ``X | None``, ``tuple[X, ...]`` or ``tuple[A | B, ...]``."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, Section):
            return list(annotation.kinds())
        return [annotation] if issubclass(annotation, BaseModel) else []
    inner = () if get_origin(annotation) is Literal else get_args(annotation)
    return [section for part in inner for section in _sections_in(part)]


_INDICATORS = tuple("[]{}\"'!&*|>%@`#,")
"""Characters with a meaning in YAML, with which no plain word begins."""


def parse_override(override: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``: a dotted key and a value as in a YAML file.

    A text needs no quotes unless it begins with a character that has a meaning in YAML, such as ``[``.

    Raises:
        UserError: the text is not ``KEY=VALUE``, or the value is not valid YAML.
    """
    parts = split_assignment(override)
    if parts is None:
        raise UserError("override", override, "must be KEY=VALUE with a dotted key, e.g. partition.num_clients=50")
    key, text = parts
    _check_dotted(key, text)
    return key, parse_value(key, text)


def parse_value(key: str, text: str) -> Any:
    """Convert the text of a setting on the command line to its value in a YAML file; nothing is an empty text.

    Args:
        key: its name, for the message.
        text: a plain word, taken as a whole, or anything in quotes or brackets.

    Raises:
        UserError: it is not valid YAML.
    """
    try:
        return parse_yaml(text) if text.startswith(_INDICATORS) else parse_scalar(text) if text else ""
    except YamlError as error:
        raise UserError(
            key,
            text,
            f"is not valid YAML ({error}); a text with special characters needs quotes, and in a shell all of "
            "KEY=VALUE does if it has blanks",
        ) from None


def set_dotted(raw: RawConfig, key: str, value: Any) -> None:
    """Set a dotted key to ``value`` and create missing sections; a number in the key is an entry of a list, from 0.

    Raises:
        UserError: the key has an empty part, a section in it is a value in the mapping, or a list has no such entry.
    """
    *parents, leaf = _check_dotted(key, value)
    node: Any = raw
    for parent in parents:
        is_list = isinstance(node, list)
        child = node[_index(node, parent, key, value)] if is_list else node.setdefault(parent, {})
        if not isinstance(child, dict | list):
            raise UserError(key, value, f"{parent!r} is a value, not a section")
        node = child
    if isinstance(node, list):
        node[_index(node, leaf, key, value)] = value
    else:
        node[leaf] = value


def _check_dotted(key: str, value: Any) -> list[str]:
    """Return the parts of a dotted key; none may be empty."""
    parts = key.split(".")
    if not all(part.strip() for part in parts):
        raise UserError(key, value, "is not a key: a part before, between or after the dots is empty")
    if len(parts) > MAX_DEPTH or not key.isprintable():
        raise UserError(key, value, f"is not a key: it must be printable and have at most {MAX_DEPTH} parts")
    return parts


def _index(entries: Sequence[Any], part: str, key: str, value: Any) -> int:
    if not (part.isascii() and part.isdigit() and len(part) < 10 and int(part) < len(entries)):
        has = f"0 to {len(entries) - 1}" if entries else "none"
        example = f", e.g. {key.replace(f'.{part}', f'.0.{part}', 1)}" if entries and part.isidentifier() else ""
        raise UserError(key, value, f"{part!r} is not an entry of the list there, which has {has}{example}")
    return int(part)


def leaves(tree: Any, prefix: str = "", into_lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a nested mapping with their values; an empty mapping is a value.

    Args:
        tree: the mapping.
        prefix: the dotted key of ``tree`` itself.
        into_lists: whether the entries of a list are yielded one by one, under the key of the list; else a list is a
            value.
    """
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key), into_lists)
    elif into_lists and isinstance(tree, list):
        for value in tree:
            yield from leaves(value, prefix, into_lists)
    else:
        yield prefix, tree


def flatten(tree: RawConfig) -> dict[str, str]:
    """Convert a nested mapping to ``{dotted key: value as text}``."""
    return {
        key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in leaves(tree) if value != {}
    }


def merged(*parts: RawConfig) -> RawConfig:
    """Merge nested mappings key by key; of everything else, the last one counts."""
    result: RawConfig = {}
    for part in parts:
        for key, value in part.items():
            known = result.get(key)
            result[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result

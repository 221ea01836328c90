"""The JSON schema of an experiment: for editors, for the reference of all keys, and for ``sylva-ray show``.

It is derived from the sections, their defaults and bounds, so it cannot differ from what is checked. What only Python
can check, such as conflicts between sections, is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.config.experiment import ALL_LINEAR, ExperimentConfig
from sylva_ray.core.bounds import MAX_FLOAT, MAX_INT, MAX_TEXT
from sylva_ray.core.sections import OwnName, Section, parse_fraction, parse_size

Schema: TypeAlias = dict[str, Any]

FRACTION = {"type": "string", "pattern": r"^[-+]?[0-9]{1,9}(\.[0-9]{1,9})?(e-[0-9]{1,2})? */ *[0-9]{1,9}$"}
"""A number that is written as a fraction."""

SIZE = {"type": "string", "pattern": r"^[0-9]{1,6}(\.[0-9]{1,6})? ?[kKMGT]i?B$"}
"""A number of bytes with a unit."""

_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_EVERYTHING = {"minimum": (-MAX_INT, -MAX_FLOAT), "maximum": (MAX_INT, MAX_FLOAT), "maxLength": (MAX_TEXT,)}
"""Bounds that a field has without declaring any."""


def experiment_schema() -> Schema:
    """Return the JSON schema of an experiment, with the settings of every attack; a method's parameters are open."""
    schema = section_schema(ExperimentConfig)
    definitions = schema["$defs"]
    for name, attack in sorted(ATTACKS.items()):
        part = section_schema(attack)
        definitions |= part.pop("$defs", {})
        part.setdefault("required", ["name"] if name != "pgd" else [])
        definitions[f"attack_{name}"] = part
    own = {"type": "object", "properties": {"name": TypeAdapter(OwnName).json_schema()}, "required": ["name"]}
    definitions["attack_of_your_own"] = own | {"description": "an attack of your own; its class has its settings"}
    names = [*sorted(ATTACKS), "of_your_own"]
    definitions["Attack"] = {"anyOf": [{"$ref": f"#/$defs/attack_{name}"} for name in names]}
    modules = definitions["LoraSection"]["properties"]["target_modules"]
    definitions["LoraSection"]["properties"]["target_modules"] = {
        key: modules.pop(key) for key in ("default", "description")
    } | {"anyOf": [modules, {"const": ALL_LINEAR}]}
    return schema


def section_schema(section: type[Section]) -> Schema:
    """Return the JSON schema of a section, as it is written in YAML."""
    schema: Schema = _tidied(section.model_json_schema(schema_generator=_AsWritten))
    return schema


class _AsWritten(GenerateJsonSchema):
    """Numbers that may be written as texts: fractions and sizes."""

    def function_before_schema(self, schema: Any) -> JsonSchemaValue:
        inner = super().function_before_schema(schema)
        text = {parse_fraction: FRACTION, parse_size: SIZE}.get(schema["function"]["function"])
        return inner if text is None else {"anyOf": [inner, dict(text)]}


def _tidied(node: Any) -> Any:
    """Return a schema with its bounds in the words of JSON Schema, without those of every number, and on one line."""
    if isinstance(node, list):
        return [_tidied(part) for part in node]
    if not isinstance(node, Mapping):
        return node
    renamed = {_BOUNDS.get(key, key): value for key, value in node.items() if not _is_implied(key, value)}
    tidied = {key: value if key in ("default", "const", "enum") else _tidied(value) for key, value in renamed.items()}
    if isinstance(tidied.get("title"), str):
        del tidied["title"]
    if isinstance(tidied.get("description"), str):
        tidied["description"] = " ".join(tidied["description"].replace("``", "`").split())
    return tidied


def _is_implied(key: str, value: Any) -> bool:
    return not isinstance(value, Mapping | list) and value in _EVERYTHING.get(key, ())

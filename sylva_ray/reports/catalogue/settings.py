"""Every setting of an experiment: its type, range, default and meaning, read from the JSON schema of its section."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.json_schema import FRACTION, SIZE, Schema, experiment_schema, section_schema
from sylva_ray.core.sections import Section
from sylva_ray.core.text import budget_text
from sylva_ray.core.yaml import to_yaml


@dataclass(frozen=True)
class Setting:
    """A setting in words.

    Attributes:
        key: dotted, from the top of the configuration.
        type: in the words of YAML, e.g. ``integer or auto``.
        range: of numbers, e.g. ``at least 1``; empty: none, or the type says it.
        default: as it is written in YAML.
        meaning: a sentence; empty where the name says it.
    """

    key: str
    type: str
    range: str
    default: str
    meaning: str

    @property
    def words(self) -> tuple[str, ...]:
        """The words among which one is chosen, and other types of values that it may have."""
        return tuple(re.split(", | or ", self.type))


def experiment_settings() -> list[Setting]:
    """Return the settings of an experiment in the order of its sections, without the parameters of methods."""
    schema = experiment_schema()
    return list(_settings(schema, schema["$defs"], ""))


def parameter_settings(parameters: type[Section], prefix: str) -> list[Setting]:
    """Return the settings of one section, such as the parameters of a method or those of an attack.

    Args:
        parameters: the section.
        prefix: the key of the section; empty: keys are those inside it.
    """
    schema = section_schema(parameters)
    return list(_settings(schema, schema.get("$defs", {}), prefix))


def section_descriptions() -> dict[str, str]:
    """Return what each section of an experiment is for, by its key, in the order of the sections."""
    schema = experiment_schema()
    return {key: _resolved(node, schema["$defs"]).get("description", "") for key, node in _sections_of(schema)}


def _sections_of(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for name in ExperimentConfig.model_fields:
        node = schema["properties"][name]
        if "properties" in _resolved(node, schema["$defs"]):
            yield name, node


def _settings(section: Schema, definitions: Mapping[str, Schema], prefix: str) -> Iterator[Setting]:
    for name, node in section["properties"].items():
        key = f"{prefix}.{name}" if prefix else name
        resolved = _resolved(node, definitions)
        if "properties" in resolved:
            defaults = node.get("default") or {}
            given = {inner: part | {"default": defaults[inner]} for inner, part in _given(resolved, defaults)}
            yield from _settings({"properties": resolved["properties"] | given}, definitions, key)
        else:
            yield _setting(key, node, definitions)


def _given(section: Schema, defaults: Mapping[str, Any]) -> Iterator[tuple[str, Schema]]:
    """Yield those properties whose default is another one where the section stands."""
    for name, node in section["properties"].items():
        if name in defaults:
            yield name, node


def _setting(key: str, node: Schema, definitions: Mapping[str, Schema]) -> Setting:
    options = list(dict.fromkeys(_type_texts(node, definitions)))
    default = "must be given" if "default" not in node else _value_text(key, node["default"])
    meaning = node.get("description", "").replace("None:", "null:")
    return Setting(
        key, ", ".join(options[:-1]) + " or " * (len(options) > 1) + options[-1], _range_text(node), default, meaning
    )


def _resolved(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    reference = node.get("$ref")
    return definitions[reference.rpartition("/")[2]] if reference else node


def _type_texts(node: Schema, definitions: Mapping[str, Schema]) -> Iterator[str]:
    if "anyOf" in node:
        for part in node["anyOf"]:
            yield from _type_texts(part, definitions)
    elif "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        yield "attack" if name == "Attack" else f"section with {', '.join(definitions[name].get('properties', {}))}"
    elif "enum" in node:
        yield from map(str, node["enum"])
    elif "const" in node:
        yield str(node["const"])
    elif node.get("pattern") == FRACTION["pattern"]:
        yield "fraction such as 8/255"
    elif node.get("pattern") == SIZE["pattern"]:
        yield "size such as 8 GB"
    elif node.get("type") == "array":
        yield f"list of {' or '.join(_type_texts(node.get('items', {}), definitions))}"
    elif node.get("type") == "object":
        yield "mapping of texts"
    else:
        yield {"string": "text"}.get(str(node.get("type")), str(node.get("type", "any value")))


def _range_text(node: Schema) -> str:
    """Return the bounds of a number, in whatever alternative of the type they stand."""
    if node.get("type") == "array":
        return _range_text(node.get("items", {}))
    bounds = {
        key: value for part in [*map(_bounds, node.get("anyOf", ())), _bounds(node)] for key, value in part.items()
    }
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    return " and ".join(f"{words[key]} {_number(bounds[key])}" for key in words if key in bounds)


def _bounds(node: Schema) -> dict[str, float]:
    inner = {key: value for part in node.get("anyOf", ()) for key, value in _bounds(part).items()}
    names = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    return inner | {key: node[key] for key in names if key in node}


def _number(value: float) -> str:
    if value >= 2**40:
        return f"2^{math.log2(value):.0f}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _value_text(key: str, value: Any) -> str:
    """Return a default as it is written in YAML; budgets as fractions of 255."""
    if value is None:
        return "null"
    if isinstance(value, float) and key.endswith("epsilon"):
        return budget_text(value)
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return _flow_text(value)
    return to_yaml(value).removesuffix("...\n").strip()


def _flow_text(value: Any) -> str:
    """Return a list or a mapping in one line of YAML."""
    if isinstance(value, Mapping):
        shown = {key: part for key, part in value.items() if part is not None}
        return f"{{{', '.join(f'{key}: {_value_text(key, part)}' for key, part in shown.items())}}}"
    return f"[{', '.join(_value_text('', part) for part in value)}]"

"""The JSON schema with which an editor completes and checks the YAML file of an experiment while it is written.

Editors with a YAML language server find it by a comment in the file: ``# yaml-language-server: $schema=FILE``.
"""

from __future__ import annotations

from sylva_ray.algorithms.registry import ALGORITHMS
from sylva_ray.config.json_schema import Schema, experiment_schema, section_schema
from sylva_ray.reports.catalogue.entries import ENTRIES

SCHEMA_FILE = "experiment.schema.json"
"""Name of the file beside a configuration."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def editor_schema() -> Schema:
    """Return the schema of an experiment with the parameters of every method of this package and known names.

    Names that are not known here, such as ``my_package.my_module:Name`` and timm's models, are allowed everywhere.
    """
    schema: Schema = {"$schema": DIALECT, "title": "An experiment of sylva_ray", **experiment_schema()}
    definitions = schema["$defs"]
    default = definitions["AlgorithmSection"]["properties"]["name"]["default"]
    choices = []
    for name, method in ALGORITHMS.items():
        parameters = section_schema(method.Parameters)
        for inner, part in parameters.pop("$defs", {}).items():
            assert definitions.setdefault(inner, part) == part, f"two sections are called {inner}"
        parameters["properties"] = {"name": {"const": name}} | parameters["properties"]
        definitions[f"method_{name}"] = parameters
        is_chosen: Schema = {"properties": {"name": {"const": name}}, "required": [] if name == default else ["name"]}
        choices.append({"if": is_chosen, "then": {"$ref": f"#/$defs/method_{name}"}})
    definitions["AlgorithmSection"]["allOf"] = choices
    for section, kind in (
        ("AlgorithmSection", "methods"),
        ("DatasetSection", "datasets"),
        ("BackboneSection", "backbones"),
    ):
        names = [entry.name for entry in ENTRIES[kind]() if " " not in entry.name and "PATH" not in entry.name]
        field = definitions[section]["properties"]["name"]
        field["anyOf"] = [{"enum": names}, {"type": field.pop("type")}]
    return schema

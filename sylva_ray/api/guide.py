"""Functions to find one's way: what there is, what a name means, and a first configuration of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sylva_ray.api.arguments import check_texts
from sylva_ray.config.recipes import FOLDERS, Recipe, recipes
from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import output_path
from sylva_ray.core.own_code import importing_from
from sylva_ray.core.text import did_you_mean

if TYPE_CHECKING:
    from sylva_ray.reports.catalogue.entries import Entry

KINDS = ("methods", "attacks", "datasets", "backbones", "partitions", "checks", "recipes")
"""Of what `catalogue` lists."""


def catalogue(kind: str) -> list[Entry]:
    """Return what a configuration may name, each with a sentence.

    Args:
        kind: methods, attacks, datasets, backbones, partitions, checks or recipes.

    Returns:
        Entries with ``name`` and ``summary``.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError("KIND", kind, f"is not known; {did_you_mean(kind, KINDS)}Kinds: {', '.join(KINDS)}")
    from sylva_ray.reports.catalogue.entries import ENTRIES

    return ENTRIES[kind]()


def listed(kind: str, *, columns: int = 80) -> list[str]:
    """Return the lines of ``sylva-ray list``; see `catalogue`.

    Args:
        kind: as of `catalogue`.
        columns: of the terminal, characters; text is wrapped at 40 at least.

    Raises:
        UserError: there is no such kind.
    """
    entries = catalogue(kind)

    from sylva_ray.reports.catalogue.show import entry_lines

    return entry_lines(entries, columns)


def describe(name: str, *, columns: int = 80, imports: Sequence[str | Path] = ()) -> list[str]:
    """Describe a setting, a section, a method, whatever else has this name, or a word of the glossary.

    Args:
        name: a key such as ``attack.epsilon``, a section, a name of `catalogue`, or a word such as ``guard``.
        columns: of the terminal, characters; text is wrapped at 40 at least.
        imports: directories of your own methods' code.

    Returns:
        Lines of text: type, range, default, meaning, and where it is declared.

    Raises:
        UserError: nothing has this name.
    """
    check_texts("imports", imports)
    if not isinstance(name, str):
        raise UserError("name", name, "must be a text")
    from sylva_ray.observers.registry import TRACKERS
    from sylva_ray.reports.catalogue.show import description

    with importing_from(imports):
        return description(name, columns, TRACKERS)


def setting_keys(name: str) -> list[str]:
    """Return the dotted keys of an experiment that end with a name: ``training.rounds`` for ``rounds``."""
    from sylva_ray.reports.catalogue.show import keys_ending_with

    return keys_ending_with(name)


def where_to_read(key: str) -> str:
    """Return how to read more about a setting, its section or an attack, after a space; nothing for other keys.

    Args:
        key: of a `UserError`, e.g. ``attack.epsilon``, ``evaluation.attacks.0.steps`` or ``--attack pgd.steps``, or
            the end of a parameter of methods, e.g. ``class_balance``.
    """
    if key == "--attack" or key.startswith("--attack "):
        name = key.removeprefix("--attack").strip().partition(".")[0]
        return f" (more: sylva-ray {f'show {name}' if name else 'list attacks'})"
    section, field = [*key.split("."), ""][:2]

    from sylva_ray.config.experiment import ExperimentConfig
    from sylva_ray.core.sections import Section

    declared = ExperimentConfig.model_fields.get(section)
    if declared is None:
        keys = setting_keys(key) if key.isidentifier() else []
        is_parameter = len(keys) == 1 and keys[0].startswith("algorithm.")  # others are named by the error itself
        return f" (more: sylva-ray show {keys[0]})" if is_parameter else ""
    kind = declared.annotation
    is_field = isinstance(kind, type) and issubclass(kind, Section) and field in kind.model_fields
    return f" (more: sylva-ray show {f'{section}.{field}' if is_field else section})"


def init(folder: str | Path, recipe: str = "digits") -> list[Path]:
    """Copy a recipe to a folder, to be changed there, with a schema by which editors complete its keys.

    Args:
        folder: gets ``configs/`` and, for a sweep, ``tune_spaces/``; it may exist, but none of the files.
        recipe: one of ``catalogue("recipes")``.

    Returns:
        The new files; the first is the copy.

    Raises:
        UserError: there is no such recipe, or one of the files exists.
    """
    found = recipes()
    if recipe not in found:
        raise UserError("--recipe", recipe, f"is not known; {did_you_mean(recipe, found)}Recipes: {', '.join(found)}")
    texts = _files_of(found[recipe], output_path("DIR", folder, "folder"))
    for path in texts:
        if path.exists():
            raise UserError("DIR", str(path), "exists already; name another folder")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _files_of(recipe: Recipe, folder: Path) -> dict[Path, str]:
    """Return the files that a recipe needs, by their paths in ``folder``; the schema of an experiment last."""
    from sylva_ray.reports.catalogue.editor_schema import SCHEMA_FILE, editor_schema

    text = recipe.path.read_text(encoding="utf-8")
    place = folder / recipe.path.parent.name / recipe.path.name
    if recipe.kind == "space":
        base = next(recipe for recipe in recipes().values() if f"base: ../{FOLDERS[0]}/{recipe.path.name}" in text)
        return {place: text} | _files_of(base, folder)
    if recipe.kind == "pretraining":
        return {place: text}
    schema = json.dumps(editor_schema(), indent=1) + "\n"
    return {place: f"# yaml-language-server: $schema={SCHEMA_FILE}\n{text}", place.parent / SCHEMA_FILE: schema}

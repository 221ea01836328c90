"""What ``sylva-ray show NAME`` prints: a setting, section, method, attack, check, backbone, recipe, or another word."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import TextWrapper, indent

from sylva_ray.algorithms.registry import ALGORITHMS, find_algorithm
from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.recipes import recipes
from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import Section
from sylva_ray.core.text import did_you_mean
from sylva_ray.data.partition import PARTITIONS
from sylva_ray.federation.parameters import MethodParameters
from sylva_ray.metrics.check_titles import CHECK_TITLES
from sylva_ray.models.shipped import SHIPPED
from sylva_ray.reports.catalogue.entries import ENTRIES, Entry
from sylva_ray.reports.catalogue.glossary import glossary
from sylva_ray.reports.catalogue.settings import (
    Setting,
    experiment_settings,
    parameter_settings,
    section_descriptions,
)

NARROWEST, WIDEST = 40, 100
"""Columns for which lines are broken."""

TYPES = {"integer", "number", "boolean", "text", "null", "auto", "true", "false"}
"""Words of types that are no names of anything."""

LABEL = 10
"""Columns of the words before a value."""


def entry_lines(entries: Sequence[Entry], columns: int) -> list[str]:
    """Write names and sentences in two columns, or below each other where the names are long.

    Args:
        entries: of one kind.
        columns: of the terminal.
    """
    width = max(len(entry.name) for entry in entries) + 2
    if width > columns // 3:
        return [line for entry in entries for line in (entry.name, *_filled(entry.summary, columns, 4))]
    wrapper = TextWrapper(_limited(columns), subsequent_indent=" " * width)
    return [line for entry in entries for line in wrapper.wrap(f"{entry.name:{width}}{entry.summary}")]


def description(name: str, columns: int, trackers: Mapping[str, type]) -> list[str]:
    """Describe whatever has this name.

    Args:
        name: a key (``attack.epsilon``, ``evaluation.attacks.0.steps``), a section (``attack``), a method, attack,
            check, data set, backbone, partition, tracker or recipe, a word that a setting may have as its value, one
            of the glossary (``guard``), or the end of a single key (``class_balance``).
        columns: of the terminal.
        trackers: by their names.

    Raises:
        UserError: nothing has this name.
    """
    settings = {setting.key: setting for setting in _all_settings()}
    if name in settings:
        return _setting_lines(settings[name], columns)
    inside = [setting for key, setting in settings.items() if key.startswith(f"{name}.")]
    if inside:
        about = section_descriptions().get(name, "")
        return [*_filled(about, columns), *_blank(about), *_table_lines(inside, columns)]
    if lines := _inner_lines(name, settings, columns):
        return lines
    for known, describe in _KINDS:
        if known(name):
            return describe(name, columns)
    if name in trackers:
        about = inspect.cleandoc(trackers[name].__doc__ or "")
        return [name, *_labelled([("tracker", about), ("use", f"tracking.observers=[{name}]")], columns)]
    if choosing := [setting for setting in settings.values() if name in set(setting.words) - TYPES]:
        return _value_lines(name, choosing, columns)
    if "section with" in getattr(settings.get(name.rpartition(".")[0]), "type", ""):
        return _setting_lines(settings[name.rpartition(".")[0]], columns)
    return _word_lines(name, columns) or description(_only_key(name, settings), columns, trackers)


def _word_lines(name: str, columns: int) -> list[str]:
    """Describe a word of the glossary, also in the plural; nothing if it has no such word.

    Raises:
        UserError: the word is a kind of names.
    """
    if name in ENTRIES:
        raise UserError("NAME", name, f"is a kind of names, which `sylva-ray list {name}` shows")
    words = glossary()
    meaning = words.get(name.lower()) or words.get(name.lower().removesuffix("s"))
    return [name, *_labelled([("meaning", meaning)], columns)] if meaning else []


def _only_key(name: str, settings: Iterable[str]) -> str:
    """Return the key that ends with a name.

    Raises:
        UserError: several keys do, or none.
    """
    keys = [key for key in keys_ending_with(name) if key != name]
    if len(keys) > 1:
        raise UserError("NAME", name, f"several keys end with this; one of: {', '.join(keys)}")
    if not keys:
        of_kinds = (entry.name for kind in ENTRIES for entry in ENTRIES[kind]())
        hint = did_you_mean(name, [*settings, *section_descriptions(), *glossary(), *of_kinds])
        fix = f"nothing has this name; {hint}`sylva-ray list` shows names, `show training` its keys"
        raise UserError("NAME", name, fix)
    return keys[0]


def keys_ending_with(name: str) -> list[str]:
    """Return the keys of settings, of sections and of methods' parameters that end with a name, the shortest first."""
    common = {setting.key for setting in _all_settings()}
    of_methods = {s.key for m in ALGORITHMS.values() for s in parameter_settings(m.Parameters, "algorithm")}
    sections = {key[: dot.start()] for key in common for dot in re.finditer(r"\.", key)}
    found = [key for key in common | of_methods | sections if f".{key}".endswith(f".{name}")]
    return sorted(found, key=lambda key: (key.count("."), key))


def _all_settings() -> list[Setting]:
    """Return the settings of an experiment, and the parameters that every method has."""
    return [*experiment_settings(), *parameter_settings(MethodParameters, "algorithm")]


def _inner_lines(name: str, settings: Mapping[str, Setting], columns: int) -> list[str]:
    """Describe a key of one method's parameters or inside a list, e.g. ``evaluation.attacks.0.epsilon``.

    Returns:
        Lines of text; none if there is no such key.
    """
    if name.startswith("algorithm."):
        return _variant_lines(name, {n: (m.Parameters, "algorithm") for n, m in ALGORITHMS.items()}, columns)
    outer, _, inner = re.sub(r"\.\d+(?=\.|$)", "\0", name, count=1).partition("\0")
    if outer == name or outer not in settings or not settings[outer].type.startswith("list of "):
        return []
    if not inner:
        return _setting_lines(settings[outer], columns)
    if settings[outer].type != "list of attack":
        return []
    lines = _variant_lines(inner.removeprefix("."), {n: (attack, "") for n, attack in ATTACKS.items()}, columns)
    return [name, *lines[1:]] if lines else []


def _variant_lines(key: str, owners: Mapping[str, tuple[type[Section], str]], columns: int) -> list[str]:
    """Describe a parameter that some methods or attacks have, once for all that have it with the same default.

    Args:
        key: of the parameter.
        owners: the parameters of each, and the key of their section.
        columns: of the terminal.
    """
    variants: dict[Setting, list[str]] = {}
    for owner, (parameters, prefix) in owners.items():
        for setting in parameter_settings(parameters, prefix):
            if setting.key == key:
                variants.setdefault(setting, []).append(owner)
    lines = []
    for setting, names in variants.items():
        lines += _labelled([("of", ", ".join(names)), *_rows(setting)], columns)
    return [key, *lines] if lines else []


def _value_lines(name: str, settings: Sequence[Setting], columns: int) -> list[str]:
    """Describe a word by the settings whose value it may be, and by what is said about their sections."""
    lines = [name]
    for setting in settings:
        section = setting.key.partition(".")[0]
        rows = [("use", f"{setting.key}={name}"), ("meaning", setting.meaning)]
        lines += _labelled([*rows, ("section", section_descriptions().get(section, ""))], columns)
    return lines


def _setting_lines(setting: Setting, columns: int) -> list[str]:
    section = setting.key.rpartition(".")[0].partition(".")[0]
    about = section_descriptions().get(section, "")
    source = ExperimentConfig.model_fields[section].annotation if section else ExperimentConfig
    if setting.key.startswith("algorithm.") and setting.key != "algorithm.name":
        source, about = MethodParameters, "defaults are those of the base method; `sylva-ray show METHOD` has others"
    place = f"{getattr(source, '__module__', '')}.{getattr(source, '__qualname__', '')}"
    rows = [*_rows(setting), *([("section", about)] if about else []), ("source", place)]
    return [setting.key, *_labelled(rows, columns)]


def _rows(setting: Setting) -> list[tuple[str, str]]:
    """Return what a setting is, each with a label; nothing that is empty."""
    rows = [
        ("type", setting.type),
        ("range", setting.range),
        ("default", setting.default),
        ("meaning", setting.meaning),
    ]
    return [row for row in rows if row[1]]


def _method_lines(name: str, columns: int) -> list[str]:
    method = find_algorithm(name)
    module = inspect.cleandoc(sys.modules[method.__module__].__doc__ or "")
    rows = [
        ("method", inspect.cleandoc(method.__doc__ or "")),
        *(("paper", paper) for paper in method.papers),
        ("about", module),
        ("source", f"{method.__module__}.{method.__qualname__}"),
        ("use", f"algorithm.name={name}"),
    ]
    common = {setting.key: setting for setting in parameter_settings(MethodParameters, "algorithm")}
    own = [
        setting
        for setting in parameter_settings(method.Parameters, "algorithm")
        if setting.key not in common or setting.default != common[setting.key].default
    ]
    title = "Its parameters, and where its defaults differ from those of `sylva-ray show algorithm`:"
    lines = [name, *_labelled(rows, columns)]
    return [*lines, "", *_filled(title, columns), *_table_lines(own, columns)] if own else lines


def _attack_lines(name: str, columns: int) -> list[str]:
    attack = ATTACKS[name]
    module = inspect.cleandoc(sys.modules[attack.__module__].__doc__ or "")
    rows = [
        ("attack", " ".join(module.split("\n\n"))),
        ("source", f"{attack.__module__}.{attack.__qualname__}"),
        ("use", f"sylva-ray evaluate RUN --attack {name}"),
    ]
    settings = [setting for setting in parameter_settings(attack, "") if setting.key != "name"]
    return [name, *_labelled(rows, columns), "", *_table_lines(settings, columns)]


def _check_lines(name: str, columns: int) -> list[str]:
    check = CHECK_TITLES[name]
    rows = [
        ("check", check.title),
        ("passes if", check.exactly),
        ("if not", check.failure),
        ("use", "sylva-ray evaluate RUN --checks"),
    ]
    return [name, *_labelled(rows, columns)]


def _backbone_lines(name: str, columns: int) -> list[str]:
    lines: list[str] = []
    was_item = False
    for block in re.split(r"\n+(?=\* )|\n\n", SHIPPED[name].card.read_text(encoding="utf-8").strip()):
        is_item = block.startswith("* ")
        text = " ".join(block.split())
        lines += [*_blank("" if is_item and was_item else "".join(lines)), *_filled(text, columns, 0, "  " * is_item)]
        was_item = is_item
    return lines


def _partition_lines(name: str, columns: int) -> list[str]:
    return [name, *_labelled([("partition", inspect.cleandoc(PARTITIONS[name].__doc__ or ""))], columns)]


def _recipe_lines(name: str, columns: int) -> list[str]:
    text = recipes()[name].path.read_text(encoding="utf-8").rstrip().splitlines()
    return [*_entry_lines(name, columns), "", *text] if _dataset(name) is not None else text


def _entry_lines(name: str, columns: int) -> list[str]:
    """Describe a data set by its entry; what follows a colon is the user's."""
    entry = _dataset(name)
    assert entry is not None, "known"
    return [entry.name, *_labelled([("data set", entry.summary), ("use", f"dataset.name={name}")], columns)]


def _dataset(name: str) -> Entry | None:
    kind, colon, _ = name.partition(":")
    entries = ENTRIES["datasets"]()
    return next((entry for entry in entries if entry.name == name or (colon and entry.name == f"{kind}:PATH")), None)


_Known = Callable[[str], bool]
_KINDS: tuple[tuple[_Known, Callable[[str, int], list[str]]], ...] = (
    (lambda name: name in recipes(), _recipe_lines),
    (lambda name: _dataset(name) is not None, _entry_lines),
    (lambda name: name in ALGORITHMS or ":" in name, _method_lines),
    (ATTACKS.__contains__, _attack_lines),
    (CHECK_TITLES.__contains__, _check_lines),
    (SHIPPED.__contains__, _backbone_lines),
    (PARTITIONS.__contains__, _partition_lines),
)
"""What else may have a name, in the order in which it is looked for."""


def _table_lines(settings: Sequence[Setting], columns: int) -> list[str]:
    """Write one setting after the other: key and default, then type, range and meaning, indented."""
    lines = []
    for setting in settings:
        details = "; ".join(filter(None, (setting.type, setting.range, setting.meaning)))
        lines += [*_filled(f"{setting.key} = {setting.default}", columns), *_filled(details, columns, 4)]
    return lines


def _labelled(rows: Iterable[tuple[str, str]], columns: int) -> list[str]:
    wrapper = TextWrapper(_limited(columns), subsequent_indent=" " * (LABEL + 2), break_on_hyphens=False)
    return [
        line
        for label, text in rows
        for line in wrapper.wrap(f"  {label:{LABEL}}{' '.join(text.replace('``', '`').split())}")
    ]


def _filled(text: str, columns: int, spaces: int = 0, hanging: str = "") -> list[str]:
    wrapper = TextWrapper(_limited(columns) - spaces, subsequent_indent=hanging, break_on_hyphens=False)
    return indent("\n".join(wrapper.wrap(text)), " " * spaces).splitlines()


def _limited(columns: int) -> int:
    return min(max(columns, NARROWEST), WIDEST)


def _blank(text: str) -> list[str]:
    return [""] if text else []

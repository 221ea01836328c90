"""What ``sylva-ray show NAME`` prints: a setting, a section, a method, an attack, a check, a backbone or a recipe."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from textwrap import TextWrapper, indent

from sylva_ray.algorithms.registry import ALGORITHMS, find_algorithm
from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.recipes import recipes
from sylva_ray.core.errors import UserError
from sylva_ray.core.text import did_you_mean
from sylva_ray.data.partition import PARTITIONS
from sylva_ray.federation.parameters import MethodParameters
from sylva_ray.metrics.check_titles import CHECK_TITLES
from sylva_ray.models.shipped import SHIPPED
from sylva_ray.reports.catalogue.entries import ENTRIES, Entry
from sylva_ray.reports.catalogue.settings import (
    Setting,
    experiment_settings,
    parameter_settings,
    section_descriptions,
)

NARROWEST, WIDEST = 40, 100
"""Columns for which lines are broken."""

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


def description(name: str, columns: int) -> list[str]:
    """Describe whatever has this name.

    Args:
        name: a key (``attack.epsilon``), a section (``attack``), or a method, attack, check, backbone, partition or
            recipe.
        columns: of the terminal.

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
    for known, describe in _KINDS:
        if known(name):
            return describe(name, columns)
    names = [*settings, *section_descriptions(), *(entry.name for kind in ENTRIES for entry in ENTRIES[kind]())]
    fix = f"nothing has this name; {did_you_mean(name, names)}`sylva-ray list` shows names, `show training` its keys"
    raise UserError("NAME", name, fix)


def _all_settings() -> list[Setting]:
    """Return the settings of an experiment, and the parameters that every method has."""
    return [*experiment_settings(), *parameter_settings(MethodParameters, "algorithm")]


def _setting_lines(setting: Setting, columns: int) -> list[str]:
    section = setting.key.rpartition(".")[0].partition(".")[0]
    about = section_descriptions().get(section, "")
    source = ExperimentConfig.model_fields[section].annotation if section else ExperimentConfig
    if setting.key.startswith("algorithm.") and setting.key != "algorithm.name":
        source, about = MethodParameters, "defaults are those of the base method; `sylva-ray show METHOD` has others"
    rows = [
        ("type", setting.type),
        ("range", setting.range),
        ("default", setting.default),
        ("meaning", setting.meaning),
        ("section", about),
        ("source", f"{getattr(source, '__module__', '')}.{getattr(source, '__qualname__', '')}"),
    ]
    return [setting.key, *_labelled([row for row in rows if row[1]], columns)]


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
    rows = [("check", check.title), ("passes if", check.passes_if), ("more", "docs/checks.md")]
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
    del columns
    return recipes()[name].path.read_text(encoding="utf-8").rstrip().splitlines()


_Known = Callable[[str], bool]
_KINDS: tuple[tuple[_Known, Callable[[str, int], list[str]]], ...] = (
    (lambda name: name in ALGORITHMS or ":" in name, _method_lines),
    (ATTACKS.__contains__, _attack_lines),
    (CHECK_TITLES.__contains__, _check_lines),
    (SHIPPED.__contains__, _backbone_lines),
    (PARTITIONS.__contains__, _partition_lines),
    (lambda name: name in recipes(), _recipe_lines),
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

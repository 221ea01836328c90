"""Write docs/settings.md, the reference of all settings of an experiment, from the schema of its sections.

    python scripts/settings_docs.py

`tests/test_docs.py` holds the page equal to what this prints.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable
from pathlib import Path

from sylva_ray.algorithms.registry import ALGORITHMS
from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.federation.parameters import MethodParameters
from sylva_ray.reports.catalogue.entries import ENTRIES
from sylva_ray.reports.catalogue.settings import (
    Setting,
    experiment_settings,
    parameter_settings,
    section_descriptions,
)

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
INTRODUCTION = """\
# All settings

Every key of an experiment, generated from the code by `scripts/settings_docs.py`. `sylva-ray show KEY` prints the same
in a terminal, and `sylva-ray init DIR` copies a configuration with a JSON schema, with which editors complete keys and
check values while you write. [configuration.md](configuration.md) says how values are written. `null` means that there
is no value.
"""


def table(settings: Iterable[Setting]) -> str:
    """Write settings as a Markdown table."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for setting in settings:
        kind = ", ".join(filter(None, (setting.type, setting.range)))
        rows.append(f"| `{setting.key}` | {_cell(kind)} | `{setting.default}` | {_cell(setting.meaning)} |")
    return "\n".join(rows)


def page() -> str:
    """Write the whole page."""
    settings, sections = experiment_settings(), section_descriptions()
    parts = [INTRODUCTION, table(setting for setting in settings if "." not in setting.key) + "\n"]
    for section, text in sections.items():
        inside = [setting for setting in settings if setting.key.startswith(f"{section}.")]
        inside += parameter_settings(MethodParameters, "algorithm") if section == "algorithm" else []
        parts.append(f"## {section}\n\n{_filled(text)}\n\n{table(inside)}\n")
        if section == "algorithm":
            parts.append(_methods_part())
        if section == "evaluation":
            parts.append(_attacks_part())
    return "\n".join(parts)


def _methods_part() -> str:
    """Write what differs from the table above for each method."""
    common = {setting.key: setting.default for setting in parameter_settings(MethodParameters, "algorithm")}
    text = "Defaults above are those of the base method. A method has its own parameters, and some other defaults:"
    parts = ["### Parameters of methods", "", _filled(text), ""]
    for name, method in ALGORITHMS.items():
        inside = parameter_settings(method.Parameters, "algorithm")
        own = [setting for setting in inside if common.get(setting.key) != setting.default]
        parts += [f"#### {name}", "", table(own), ""] if own else []
    return "\n".join(parts)


def _attacks_part() -> str:
    parts = [
        "### Settings of attacks",
        "",
        "Entries of `evaluation.attacks`, and of `--attack NAME:key=value,...`.",
        "",
    ]
    for entry in ENTRIES["attacks"]():
        inside = [setting for setting in parameter_settings(ATTACKS[entry.name], "") if setting.key != "name"]
        parts += [f"#### {entry.name}", "", f"{entry.summary}.", "", table(inside), ""]
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "or")


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()

"""The documentation keeps up with the repository: links, paths, commands. `make docs` looks up the rest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.version import Version
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

import sylva_ray.cli
from sylva_ray.federation.stages.stage import STAGES
from sylva_ray.metrics.check_titles import CHECK_TITLES
from sylva_ray.reports.compare.tables import COSTS
from sylva_ray.reports.terminal import closing_lines, closing_table
from sylva_ray.storage.run_folder import RunFolder
from tests.reports.synthetic_run import make_run
from tests.test_architecture import LAYERS, ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import artefact_docs
import settings_docs

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
MARKDOWN = [name for name in TRACKED if name.endswith(".md")]
PAGES = [name for name in MARKDOWN if not name.endswith(".template.md")]
pytestmark = pytest.mark.skipif(not TRACKED, reason="needs a git checkout, whose list of files it reads")


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    """On GitHub; the site turns the same links into its own."""
    path = ROOT / page
    text = re.sub(r"`[^`\n]+`", "", prose(path))
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)\s#]*)#?([^)\s]*)\)", text):
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


WRITTEN_BY_COMMANDS = {"load.py"}
"""Python files that are no part of the sources."""


@pytest.mark.parametrize("page", PAGES)
def test_every_source_file_and_name_in_the_text_exists(page: str) -> None:
    """``federation/loop.py`` may be named from any folder on; ``sylva_ray.federation.contract.Algorithm`` in full."""
    for span in re.findall(r"`([^`\n]+)`", prose(ROOT / page)):
        for name in set(re.findall(r"[\w./-]+\.py\b", span)) - WRITTEN_BY_COMMANDS:
            assert any(f"/{tracked}".endswith(f"/{name}") for tracked in TRACKED), name
        for name in re.findall(r"\bsylva_ray(?:\.\w+)+", span):
            module, _, last = name.rpartition(".")
            place, folder = Path(ROOT, *name.split(".")), Path(ROOT, *module.split("."))
            source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            assert place.is_dir() or place.with_suffix(".py").exists() or last in source.read_text(), name


@pytest.mark.parametrize("page", MARKDOWN)
def test_lines_of_prose_have_at_most_120_characters(page: str) -> None:
    """So that a diff shows what changed. Rows of tables, and a URL that fills a line, cannot be broken."""
    long = [line.strip() for line in prose(ROOT / page).splitlines() if len(line) > 120]
    assert not [line for line in long if not line.startswith("|") and " " in line]


def test_the_citation_names_the_newest_release() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert (citation["version"], str(citation["date-released"])) == newest.groups()
    own, released = Version(sylva_ray.__version__), Version(citation["version"])
    is_newer = "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
    assert (own > released and own.is_devrelease) if is_newer else own == released


def test_the_table_of_packages_is_the_order_of_layers() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert tuple(name for name, _ in rows) == LAYERS
    for package, text in rows:
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", text):
            assert (ROOT / "sylva_ray" / package / name).exists() or (ROOT / "sylva_ray" / name).exists(), name


def test_the_page_about_files_is_generated_from_their_types() -> None:
    """After a change of a type: ``python scripts/artefact_docs.py``."""
    assert (ROOT / "docs" / "summary.md").read_text() == artefact_docs.page()


def test_the_reference_of_settings_is_generated_from_the_schema() -> None:
    """After a change of a setting: ``python scripts/settings_docs.py``."""
    assert (ROOT / "docs" / "settings.md").read_text() == settings_docs.page()


def test_the_page_about_checks_has_their_names() -> None:
    rows = re.findall(r"^\| (S\d+) \| ([^|]+) \|", (ROOT / "docs" / "checks.md").read_text(), re.MULTILINE)
    assert rows == [(name, check.title) for name, check in CHECK_TITLES.items()]


def test_the_glossary_has_the_words_of_terminal_and_pages() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    entries = re.findall(r"^\*\*(.+?)\.\*\*", text, re.MULTILINE)
    assert entries == sorted(entries, key=str.lower)
    known = " ".join(text.lower().split())
    shipped = [stage for stage in STAGES.values() if stage.__module__.startswith("sylva_ray.")]
    stages = {word for stage in shipped for word in re.split(", |: ", stage.title)}
    headings = {
        "benign",
        "plain",
        "balanced",
        "front",
        "worst decile",
        "10th percentile",
        "majority",
        "median distance",
    }
    others = {
        "pgd10-eps8",
        "not kept",
        "dominated",
        "point",
        "trial",
        "own share",
        "unbounded attack",
        "windows",
        "step",
    }
    words = {*stages, *headings, *others, *COSTS} - {"adversarial", "seconds"}
    assert not [word for word in words if word not in known]


def test_the_output_in_the_tutorial_has_the_form_of_todays(tmp_path: Path) -> None:
    """Title, headings and first words of lines: a change of the terminal asks for another run of the tutorial.

    The terminal is wider than that of the tutorial, because the example has longer names.
    """
    make_run(tmp_path)
    summary = RunFolder(tmp_path).load_summary()
    assert summary is not None
    clients = [client.model_copy(update={"collapsed": False}) for client in summary.clients]
    summary = summary.model_copy(update={"clients": clients})
    console = Console(width=88)
    with console.capture() as captured:
        console.print(closing_table(console, summary, RunFolder(tmp_path).load_records()))
    (shown,) = re.findall(r"^```text\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    title, headings = (" ".join(line.split()) for line in captured.get().splitlines()[:3] if line.strip())
    assert title in " ".join(shown.split())
    assert headings.replace("pgd20-eps8", "pgd10-eps8") in " ".join(shown.split())
    known = {line.split()[0] for line in closing_lines(summary, tmp_path, None)}
    assert set(re.findall(r"^[a-z]+", shown, re.MULTILINE)) == known - {"seconds", "warning"}


APP = typer.main.get_command(sylva_ray.cli.app)
COMMAND = re.compile(r"(?:^|`|-- )sylva-ray ((?:[^`\n#\\]|\\\n)+)", re.MULTILINE)
"""At the start of a line or of a span of code, or after the ``--`` of another command."""

OTHERS = {"--instance-types", "--no-wait"}
"""Options of ``aws`` and ``ray`` in the text."""


def command_of(words: list[str]) -> tuple[TyperCommand, list[str]]:
    """The command that the first words name, and the words after them."""
    command: Any = APP
    while isinstance(command, TyperGroup) and not words[0].startswith("-"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def options_of(command: Any) -> set[str]:
    """The options of a command, or of all commands of a group."""
    inner = command.commands.values() if isinstance(command, TyperGroup) else ()
    own = {option for parameter in command.params for option in parameter.opts}
    return own.union(*map(options_of, inner), {"--help"})


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_a_block_of_code_is_parsed(page: str) -> None:
    """Its name, its options with their values, and whether an argument is missing."""
    for block in re.findall(r"^```.*?^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        for text in COMMAND.findall(block):
            command, words = command_of(text.replace("\\\n", " ").split())
            command.make_context(text, words)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_in_the_text_exists(page: str) -> None:
    for text in COMMAND.findall(prose(ROOT / page)):
        command, words = command_of(text.split())
        assert {word for word in words if word.startswith("--")} <= options_of(command), text
    if not page.startswith("benchmarks/"):  # those of its scripts are in `tests/test_scripts.py`
        assert set(re.findall(r"`(--[a-z-]+)", prose(ROOT / page))) <= options_of(APP) | OTHERS


@pytest.mark.parametrize("page", PAGES)
def test_every_target_of_make_exists(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE)) <= set(targets)

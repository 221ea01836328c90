"""Every command that a page, a recipe, an example or a help text shows is given to the real command line.

Commands that are cheap run. In place of the others, what they do first runs: files and recipes are looked up, settings
are built and checked, and so are the parameters of the method, attacks and options of an evaluation. A run folder must
be one that an earlier command of the same text has made, or stand for any (``RUN``, ``s3://BUCKET/runs/a``).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sylva_ray.cli
from sylva_ray import api
from sylva_ray.cli.app import EXAMPLES
from sylva_ray.config.recipes import recipe_or_path
from sylva_ray.core.own_code import importing_from
from sylva_ray.evaluation.request import check_options
from sylva_ray.evaluation.run import OVERRIDABLE
from sylva_ray.execution.ray.launcher import RayLauncher
from sylva_ray.preparation.experiment import with_parameters
from sylva_ray.provisioning.launcher_file import load_launcher_file
from sylva_ray.reports.compare.files import check_targets
from sylva_ray.sweeps.space import load_space
from tests.test_architecture import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
SOURCES = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("tune_spaces/*.yaml"), *ROOT.glob("examples/*.py")])

PLACEHOLDERS = {
    "CONFIG": "digits",
    "SPACE": "grid",
    "KEY": "training.rounds",
    "METHOD": "sylva",
    "NAME": "digits",
    "best.yaml": "digits",  # a sweep writes it
    "my_package.attacks:MyAttack": "pgd",
    "...": "",
}
"""Words that stand for others, and one of those."""

ANY_RUN = re.compile(r"RUN|OTHER_RUN|SWEEP|TRIAL|SOURCE|s3://.*|runs/\w+-\d{8}-\d{6}|/home/.*")
"""Run folders that no command of the text has to make: words for any, URLs, and folders with a date."""


def shown_in(path: Path) -> list[list[str]]:
    """Return the arguments of the commands in a file, as the shell would split them."""
    text = path.read_text()
    if path.suffix == ".md":
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    else:
        lines = [line.lstrip("# ") for line in text.splitlines()]
    found = [re.search(r"(?:^|-- )\s*sylva-ray (.*)", line) for line in lines]
    commands = [shlex.split(match[1], comments=True) for match in found if match]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL) if path.suffix == ".md" else ""
    commands += [shlex.split(span) for span in re.findall(r"`sylva-ray ([^`]+)`", prose)]
    return [[PLACEHOLDERS.get(word, word) for word in command] for command in commands]


class Rehearsal:
    """Stands in for the functions of `sylva_ray.api` that start something, and checks what they are given.

    Attributes:
        made: folders that commands of this text have made.
    """

    def __init__(self) -> None:
        self.made: set[str] = set()

    def run(self, config: str, overrides: Sequence[str], *, out: str | None, imports: Sequence[str], **_: Any) -> None:
        """Build the experiment and its method."""
        if config not in self.made:
            with importing_from(imports):
                with_parameters(api.load_config(config, overrides))
        self.made |= {out} if out else set()

    def dry_run(self, config: str, overrides: Sequence[str], *, columns: int, imports: Sequence[str] = ()) -> list[str]:
        """As `run`."""
        del columns
        self.run(config, overrides, out=None, imports=imports)
        return []

    def resume(self, run: str, overrides: Sequence[str], *, imports: Sequence[str], **_: Any) -> None:
        """As `run`, of a folder."""
        self._check_folder(run)
        self.run("digits", overrides, out=None, imports=imports)

    def sweep(self, space: str, overrides: Sequence[str], *, out: str | None, resume: bool, **_: Any) -> Any:
        """Build the experiments of a space."""
        self.made |= {out} if out else set()
        if resume and not out:
            self._check_folder(space)
        else:
            load_space(recipe_or_path("SPACE", space, "space"), overrides)
        return type("Done", (), {"failed": ()})

    def evaluate(  # the signature of `sylva_ray.api.evaluate`
        self,
        run: str,
        attacks: Sequence[str],
        *,
        suite: str | None,
        epsilon: str | None,
        certify: Sequence[float],
        surrogates: Sequence[str],
        overrides: Sequence[str],
        imports: Sequence[str],
        **_: Any,
    ) -> None:
        """Read the attacks and options."""
        for folder in (run, *surrogates):
            self._check_folder(folder)
        with importing_from(imports):
            check_options(attacks, suite, epsilon, certify)
        assert all(override.startswith(OVERRIDABLE) for override in overrides)
        api.load_config("digits", overrides)

    def compare(self, sources: Sequence[str], *, out: Sequence[str], **_: Any) -> None:
        """Look up the sources; ``grid`` and ``grid/grid-20260101-120000`` are in MLflow."""
        for source in filter(None, sources):
            if not re.fullmatch(r"(\w+)(/\1-\d{8}-\d{6})?", source):
                self._check_folder(source)
        check_targets(out)

    def check_cluster(
        self, file: str, config: str | None, overrides: Sequence[str], *, columns: int, imports: Sequence[str]
    ) -> list[str]:
        """Read the file and build the experiment."""
        del columns
        load_launcher_file(Path(file), RayLauncher())
        if config is not None:
            self.run(config, overrides, out=None, imports=imports)
        return []

    def traffic(self, backbone: str | None, *, methods: Sequence[str], imports: Sequence[str], **_: Any) -> None:
        """Look up the backbone and the methods."""
        names = [f"backbone.name={backbone}"] if backbone else []
        for method in methods or ("sylva",):
            self.run("digits", [*names, f"algorithm.name={method}"], out=None, imports=imports)

    def of_a_run(self, run: str, *_: Any, **__: Any) -> list[str]:
        """Look up the folder: ``export``, ``report``, ``track``, ``repair``."""
        self._check_folder(run)
        return []

    def _check_folder(self, folder: str) -> None:
        assert folder in self.made or ANY_RUN.fullmatch(folder) or "://" in folder, f"nothing before makes {folder}"


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rehearsal:
    """A working folder like a fresh checkout, with an interface that starts nothing."""
    for name in ("configs", "tune_spaces", "examples", "deploy", "cluster.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    stand_in = Rehearsal()
    for name in ("run", "dry_run", "resume", "sweep", "evaluate", "compare", "check_cluster", "traffic"):
        monkeypatch.setattr(api, name, getattr(stand_in, name))
    for name in ("export", "report", "track", "repair"):
        monkeypatch.setattr(api, name, stand_in.of_a_run)
    check_source = api.check_source
    monkeypatch.setattr(api, "check_source", lambda config, resume, out: resume or check_source(config, resume, out))
    monkeypatch.setattr(api, "check_gpus", list)
    monkeypatch.setattr(api, "pretrain", lambda config, *_, **__: recipe_or_path("CONFIG", config, "pretraining"))
    return stand_in


def call(words: Sequence[str]) -> None:
    """Run a command; a refusal fails the test with its message."""
    result = CliRunner().invoke(sylva_ray.cli.app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit | AssertionError):
        raise result.exception
    assert result.exit_code == 0, f"sylva-ray {shlex.join(words)}\n{result.stderr}{result.exception!r}"


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.usefixtures("rehearsal")
def test_every_command_that_is_shown_is_accepted(path: Path) -> None:
    for words in shown_in(path):
        if len(words) > 1 and words != ["cluster", "check"]:  # else it is the command's name
            call(words)


def test_every_example_of_a_help_text_is_accepted(rehearsal: Rehearsal) -> None:
    rehearsal.made |= {"runs/five", "runs/ten"}
    for text in EXAMPLES.values():
        call(shlex.split(text)[1:])

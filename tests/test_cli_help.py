"""Help texts: every command has an example, and nothing points to files that an installation lacks."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from sylva_ray.cli import app


def commands() -> list[tuple[str, ...]]:
    """The names of every command, those inside groups included."""

    def inside(group: typer.core.TyperGroup, before: tuple[str, ...]) -> list[tuple[str, ...]]:
        found = []
        for name, command in group.commands.items():
            found.append((*before, name))
            if isinstance(command, typer.core.TyperGroup):
                found += inside(command, (*before, name))
        return found

    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return inside(group, ())


def test_the_help_of_every_command_has_an_example_and_stands_alone() -> None:
    found = commands()
    assert ("cluster", "gpu") in found
    for names in found:
        text = " ".join(CliRunner().invoke(app, [*names, "--help"]).stdout.split())
        assert f"Example: sylva-ray {' '.join(names)}" in text, names
        assert "docs/" not in text, names


@pytest.mark.parametrize("command", ["run", "tune", "evaluate", "pretrain"])
def test_every_long_command_can_be_quiet_and_log(command: str) -> None:
    text = CliRunner().invoke(app, [command, "--help"]).stdout
    assert "--quiet" in text
    assert "--log-format" in text
    assert ("--verbose" in text) == (command != "pretrain")  # whose epochs are lines anyway


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["run", "di"], ["digits"]),
        (["tune", "gr"], ["grid"]),
        (["pretrain", "pre"], ["pretrain_tiny_imagenet", "pretrain_tiny_imagenet_robust"]),
        (["init", "x", "--recipe", "vit_b"], ["vit_base"]),
        (["list", "at"], ["attacks"]),
        (["exp"], ["export"]),
    ],
)
def test_a_shell_completes_commands_kinds_and_recipes(words: list[str], names: list[str]) -> None:
    given = {"_SYLVA_RAY_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["sylva-ray", *words])}
    result = CliRunner().invoke(
        app, [], prog_name="sylva-ray", env=given | {"COMP_CWORD": str(len(words))}, standalone_mode=False
    )
    assert result.stdout.split() == names

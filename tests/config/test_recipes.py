"""Recipes: found by name, part of the wheel, and never in the way of a file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import sylva_ray
from sylva_ray.config.recipes import FOLDERS, recipe_or_path, recipes
from sylva_ray.core.errors import UserError
from sylva_ray.sweeps.space import load_space

ROOT = Path(__file__).parents[2]


def test_every_file_of_configs_and_tune_spaces_is_a_recipe_with_a_summary() -> None:
    files = {path.stem: path for folder in FOLDERS for path in (ROOT / folder).glob("*.yaml")}
    assert {name: recipe.path for name, recipe in recipes().items()} == files
    assert all(len(recipe.summary) > 20 and recipe.summary[-1] not in ".:" for recipe in recipes().values())


def test_the_wheel_contains_the_folders_of_recipes_and_the_mark_of_types() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    recipes = {folder: f"sylva_ray/recipes/{folder}" for folder in FOLDERS}
    assert wheel["force-include"] == recipes | {"docs/glossary.md": "sylva_ray/recipes/glossary.md"}
    assert (ROOT / "sylva_ray" / "py.typed").is_file()


def test_an_experiment_is_found_by_its_name_and_a_file_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sylva_ray.load_config("digits") == sylva_ray.load_config(ROOT / "configs" / "digits.yaml")
    (tmp_path / "digits").mkdir()  # a folder that is no run, such as that of `sylva-ray init digits`
    assert sylva_ray.load_config("digits").name == "digits"
    (tmp_path / "digits" / "config.yaml").write_text("name: a_run\n")
    assert sylva_ray.load_config("digits").name == "a_run"


def test_the_base_of_a_space_may_be_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: digits\nparameters: {lora.rank: {grid: [2, 4]}}\n")
    assert load_space(tmp_path / "mine.yaml").experiment["partition"]["num_clients"] == 6


@pytest.mark.parametrize(("name", "hint"), [("digitss", "did you mean 'digits'?"), ("gird", "Recipes: cifar10")])
def test_an_unknown_name_lists_the_recipes_of_the_right_kind(name: str, hint: str) -> None:
    with pytest.raises(UserError, match="neither a file nor a recipe") as error:
        recipe_or_path("CONFIG", name, "experiment")
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluation.attacks=[{name:pgd}]", "needs a blank after the colon: write name: pgd"),
        ("attack.epsilon=", "is empty: write a value after the equals sign"),
        ("training.rounds=", "is empty: write a value after the equals sign"),
    ],
)
def test_what_is_left_out_by_mistake_is_named(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        sylva_ray.load_config("digits", [override])


def test_a_recipe_of_another_kind_is_named_with_its_command() -> None:
    with pytest.raises(UserError, match="is a recipe of another kind: sylva-ray tune grid"):
        recipe_or_path("CONFIG", "grid", "experiment")
    with pytest.raises(UserError, match="is a recipe of another kind: sylva-ray run digits"):
        recipe_or_path("SPACE", "digits", "space")

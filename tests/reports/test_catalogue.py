"""`sylva-ray list`, `show` and `init`: complete, true, and readable at 60 columns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import sylva_ray
from sylva_ray.algorithms.fedavg_at import FedAvgAT
from sylva_ray.algorithms.registry import ALGORITHMS
from sylva_ray.api import KINDS, catalogue, describe, init, listed
from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.metrics.check_titles import CHECK_TITLES
from sylva_ray.reports.catalogue.editor_schema import editor_schema
from sylva_ray.reports.catalogue.entries import ENTRIES
from sylva_ray.reports.catalogue.glossary import glossary
from sylva_ray.reports.catalogue.settings import experiment_settings, parameter_settings

ROOT = Path(__file__).parents[2]
SCHEMA = editor_schema()


def faults(config: Any) -> list[str]:
    """What the schema for editors finds wrong."""
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(config)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed_within_60_columns(kind: str) -> None:
    lines = listed(kind, columns=60)
    assert all(len(line) <= 60 for line in lines)
    assert {entry.name for entry in catalogue(kind)} <= {line.split("  ")[0] for line in lines}
    assert all(entry.summary and not entry.summary.endswith(".") for entry in catalogue(kind))
    assert tuple(ENTRIES) == KINDS


def test_the_settings_are_the_leaves_of_a_configuration_with_their_defaults() -> None:
    by_key = {setting.key: setting for setting in experiment_settings()}
    leaves = {
        key if section is None else f"{key}.{name}"
        for key, section in ((key, getattr(ExperimentConfig(), key)) for key in ExperimentConfig.model_fields)
        for name in (type(section).model_fields if hasattr(type(section), "model_fields") else [None])
        for section in ([None] if name is None else [section])
    }
    assert by_key.keys() == leaves
    epsilon = by_key["attack.epsilon"]
    assert (epsilon.type, epsilon.range, epsilon.default) == (
        "number or fraction such as 8/255",
        "at least 0 and at most 1",
        "8/255",
    )
    assert by_key["cluster.memory_per_actor"].type == "integer, size such as 8 GB or auto"
    assert (by_key["seed"].range, by_key["training.clip_norm"].default) == ("at least 0 and below 2^63", "1.0")
    assert by_key["backbone.checkpoint"].default == "null"


def test_a_section_inside_a_section_has_the_defaults_of_its_place() -> None:
    defaults = {
        name: {setting.key: setting.default for setting in parameter_settings(ALGORITHMS[name].Parameters, "algorithm")}
        for name in ("sylva", "per_lora")
    }
    assert defaults["sylva"]["algorithm.phase2.enabled"] == "true"
    assert defaults["per_lora"]["algorithm.phase2.enabled"] == "false"


SHOWN = (*ALGORITHMS, *ATTACKS, "vit_micro_robust", "S4", "dirichlet", "attack", "attack.epsilon", "algorithm")


@pytest.mark.parametrize("name", SHOWN)
def test_whatever_has_a_name_can_be_shown(name: str) -> None:
    lines = describe(name, columns=60)
    assert len(lines) > 1
    assert all(len(line) <= 60 or " " not in line.strip() for line in lines)
    papers = ALGORITHMS[name].papers if name in ALGORITHMS else ()
    assert all(f"paper {paper}" in " ".join(" ".join(lines).split()) for paper in papers)


def test_a_recipe_named_like_its_data_set_shows_both() -> None:
    text = "\n".join(describe("digits"))
    assert "dataset.name=digits" in text
    assert "\nname: digits\n" in text


def test_a_key_of_a_section_inside_a_setting_shows_the_setting() -> None:
    assert describe("training.windows.train") == describe("training.windows")


OWN_BASELINES = {"per_lora", "per_adv"}
"""Methods that no paper describes."""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_method_names_its_papers_and_the_documentation_the_same(name: str) -> None:
    papers = ALGORITHMS[name].papers
    assert bool(papers) == (name not in OWN_BASELINES)
    for paper in papers:
        assert re.fullmatch(r"\w+ et al\. 20\d\d, [^,].{20,}, .{4,}", paper)
    table = (ROOT / "docs" / "methods.md").read_text()
    column = next(line.split("|")[2] for line in table.splitlines() if line.startswith(f"| `{name}` |"))
    cited = re.findall(r"\w+ et al\. \d+", column)
    assert set(cited) == {re.match(r"\w+ et al\. \d+", paper)[0] for paper in papers}  # type: ignore[index]


def test_papers_are_not_inherited() -> None:
    class Mine(FedAvgAT):
        name = "mine"

    assert Mine.papers == ()


def test_methods_are_described_by_sentences_without_formulas() -> None:
    for entry in catalogue("methods"):
        assert re.fullmatch(r"[A-Z][^=|^()_]+", entry.summary), entry
        assert len(entry.summary) < 120


def test_shown_values_can_be_given_back() -> None:
    """Every default, written as KEY=VALUE, is the default."""
    for setting in experiment_settings():
        default = sylva_ray.load_config({}, [f"{setting.key}={setting.default}"])
        assert default == ExperimentConfig(), setting.key


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(UserError, match=r"did you mean 'attack\.epsilon'"):
        describe("atack.epsilon")


def test_the_schema_for_editors_accepts_what_is_valid_and_marks_what_is_not() -> None:
    for path in (ROOT / "configs").glob("[!p]*.yaml"):
        assert not faults(yaml.safe_load(path.read_text()))
    assert not faults(json.loads(json.dumps(ExperimentConfig().model_dump(mode="json"))))
    assert not faults({"algorithm": {"name": "my_package.my_module:Mine", "anything": 1}})
    assert not faults({"attack": {"epsilon": "8/255"}, "cluster": {"memory_per_actor": "8 GB"}})
    mistakes: tuple[dict[str, Any], ...] = (
        {"atack": {}},
        {"attack": {"epsilon": 8}},
        {"attack": {"epsilon": "8 / x"}},
        {"lora": {"rank": 0}},
        {"algorithm": {"beta": -1}},
        {"algorithm": {"name": "hetlora_at", "rank": [2]}},
        {"evaluation": {"attacks": [{"name": "pgdd"}]}},
        {"training": {"lr": -0.1}},
    )
    for wrong in mistakes:
        assert faults(wrong), wrong


def test_init_copies_a_recipe_that_can_be_run_and_overwrites_nothing(tmp_path: Path) -> None:
    config, schema = init(tmp_path / "study")
    assert sylva_ray.load_config(config) == sylva_ray.load_config("digits")
    assert config.read_text().startswith(f"# yaml-language-server: $schema={schema.name}\n")
    assert json.loads(schema.read_text()) == SCHEMA
    with pytest.raises(UserError, match="exists already"):
        init(tmp_path / "study")
    with pytest.raises(UserError, match="did you mean 'grid'"):
        init(tmp_path / "other", "gird")


def test_init_knows_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert all(path.is_relative_to(tmp_path / "study") for path in init("~/study"))
    with pytest.raises(UserError, match="exists already"):
        init(tmp_path / "study")


def test_init_of_a_space_copies_its_base_too(tmp_path: Path) -> None:
    from sylva_ray.sweeps.space import load_space

    space, *_ = init(tmp_path, "grid")
    assert load_space(space) == load_space(ROOT / "tune_spaces" / "grid.yaml")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fgsm_rs", "use attack.name=fgsm_rs"),
        ("krum", "use algorithm.robust.rule=krum"),
        ("cifar100", "use dataset.name=cifar100"),
        ("parquet:/x", "use dataset.name=parquet:/x"),
        ("tensorboard", "use tracking.observers=[tensorboard]"),
        ("evaluation.attacks.0.epsilon", "of pgd, apgd"),
        ("evaluation.attacks.0", "type list of attack"),
        ("lora.target_modules.1", "type list of text"),
        ("algorithm.temperature", "of lorica"),
    ],
)
def test_parts_of_every_kind_and_keys_inside_lists_can_be_shown(name: str, says: str) -> None:
    lines = describe(name, columns=60)
    assert says in " ".join(" ".join(lines).split())
    assert all(len(line) <= 60 for line in lines)


@pytest.mark.parametrize(
    "name", ["number", "text", "evaluation.attacks.x", "evaluation.attacks.0.stps", "seed.0", "algorithm.teacher"]
)
def test_what_has_no_name_is_not_shown(name: str) -> None:
    with pytest.raises(UserError, match="nothing has this name"):
        describe(name)


@pytest.mark.parametrize("name", ["phase2", "phase2.benign_epochs", "class_balance", "rank"])
def test_the_end_of_a_single_key_is_enough(name: str) -> None:
    section = "lora" if name == "rank" else "algorithm"
    assert describe(name) == describe(f"{section}.{name}")


def test_the_end_of_several_keys_names_them() -> None:
    with pytest.raises(UserError, match=r"one of: tracking\.enabled, algorithm\.mixture\.enabled"):
        describe("enabled")


def test_a_check_is_explained_without_the_documentation_and_in_its_words() -> None:
    table = (ROOT / "docs" / "checks.md").read_text()
    for name, check in CHECK_TITLES.items():
        assert f"| {name} | {check.title} | {check.exactly} | {check.failure} |" in table
    text = " ".join(" ".join(describe("S4")).split())
    assert CHECK_TITLES["S4"].failure in text
    assert "docs/" not in text


def test_every_word_of_the_glossary_is_shown() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text()
    entries = [line for line in page.splitlines() if line.startswith("**")]
    assert len(set(glossary().values())) == len(entries) > 50
    for word, meaning in glossary().items():
        assert word
        assert not re.search(r"\*|\]\(", meaning), meaning
    assert describe("Guard")[1].strip().startswith("meaning   In phase 2, the test on held-out images")
    assert describe("guards")[1:] == describe("guard")[1:]
    assert "worst tenth" in " ".join(describe("worst decile"))
    with pytest.raises(UserError, match="did you mean 'guard'"):
        describe("gard")

"""Every section of every configuration: strict types, finite bounded numbers, texts that are read as written."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

import sylva_ray
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import ExperimentConfig, load_config
from sylva_ray.config.schema import build, parse_override
from sylva_ray.core.bounds import MAX_FLOAT, MAX_INT
from sylva_ray.core.errors import UserError
from sylva_ray.core.sections import Section
from sylva_ray.core.yaml import parse_yaml, to_yaml
from sylva_ray.pretraining.config import PretrainConfig
from sylva_ray.sweeps.space import Space, resolved_space
from tests.fuzz.settings import valid

for module in pkgutil.walk_packages(sylva_ray.__path__, "sylva_ray."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def subclasses(base: type[Section]) -> Iterator[type[Section]]:
    for section in base.__subclasses__():
        yield section
        yield from subclasses(section)


SECTIONS = sorted({section for section in subclasses(Section) if section.__module__.startswith("sylva_ray.")}, key=repr)


def numbers(schema: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The numbers in a JSON schema, each with its place."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield place, schema
        for key, part in schema.items():
            if key != "default":
                yield from numbers(part, f"{place}.{key}")
    elif isinstance(schema, list):
        for part in schema:
            yield from numbers(part, place)


def test_all_sections_are_found() -> None:
    names = {section.__qualname__ for section in SECTIONS}
    assert {"ExperimentConfig", "PretrainConfig", "Space", "PgdAttack", "PmAfl.Parameters", "Phase2Parameters"} <= names
    assert len(SECTIONS) > 50


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__qualname__)
def test_every_number_has_two_bounds(section: type[Section]) -> None:
    for place, number in numbers(section.model_json_schema(), section.__qualname__):
        assert number.keys() & {"minimum", "exclusiveMinimum"}, place
        assert number.keys() & {"maximum", "exclusiveMaximum"}, place


def _accepts(section: type[Section], key: str, value: Any) -> bool:
    try:
        section.model_validate({key: value})
    except ValidationError as error:
        return all(problem["loc"][:1] != (key,) for problem in error.errors())  # another key may be missing
    return True


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__qualname__)
def test_no_number_is_infinite_or_a_boolean_and_no_boolean_a_number(section: type[Section]) -> None:
    definitions = section.model_json_schema()
    wrong: Any
    for key, field in definitions.get("properties", {}).items():
        kinds = {part.get("type") for part in field.get("anyOf", [field])}
        if kinds <= {"integer", "number", "null"}:
            for wrong in (True, False, "1", "x", float("nan"), float("inf"), -float("inf"), 1e39, 10**400, [1]):
                assert not _accepts(section, key, wrong), (key, wrong)
        if kinds <= {"integer", "null"}:
            assert not _accepts(section, key, 1.0), key
            assert not _accepts(section, key, 2**63), key
        if kinds <= {"boolean", "null"}:
            for wrong in (0, 1, 1.0, "true", "yes", "no", [True]):
                assert not _accepts(section, key, wrong), (key, wrong)
        if kinds <= {"string", "null"}:
            for wrong in (1, True, "a\0b", "a\nb", "\x1b[31m", "\ud800", "x" * 5000, ["a"]):
                assert not _accepts(section, key, wrong), (key, wrong)


class Own(Section):
    """The parameters of a method outside this package, without any bounds."""

    count: int = 3
    factor: float = 0.5
    pair: tuple[int, float] | None = None
    table: dict[str, float] = Field({})
    kind: int | Literal["auto"] = "auto"
    label: str | None = None
    is_used: bool = False
    large: int = Field(0, le=10**12)


def test_the_fields_of_others_have_the_same_rules() -> None:
    right: dict[str, Any] = {
        "count": -MAX_INT,
        "factor": 3,
        "pair": [1, 2],
        "table": {"a": MAX_FLOAT},
        "kind": 7,
        "label": "é 字",
        "is_used": True,
        "large": 10**12,
    }
    own = build(Own, right)
    assert (own.factor, own.pair, own.table, own.kind, own.large) == (3.0, (1, 2.0), {"a": MAX_FLOAT}, 7, 10**12)
    assert isinstance(own.factor, float)
    wrong: dict[str, Any] = {
        "count": MAX_INT + 1,
        "factor": 1e39,
        "pair": [1, float("nan")],
        "table": {"a": True},
        "kind": True,
        "label": "a\rb",
        "is_used": 1,
        "large": 10**12 + 1,
    }
    for key, value in wrong.items():
        with pytest.raises(UserError, match=f"^{key}"):
            build(Own, right | {key: value})


def test_tags_may_have_several_lines_and_nothing_else_may() -> None:
    config = build(ExperimentConfig, {"tracking": {"tags": {"mlflow.note.content": "one\n\ttwo"}}})
    assert build(ExperimentConfig, parse_yaml(config.to_yaml())) == config
    with pytest.raises(UserError, match="one line"):
        build(ExperimentConfig, {"tracking": {"tags": {"a": "\x1b[31m"}}})


@pytest.mark.parametrize(
    "value", [float("inf"), float("nan"), {"a": [1e39]}, "a\nb", {1: 2}, {"a\n": 2}, object(), 10**400]
)
def test_parameters_of_a_method_are_checked_before_the_method_is_known(value: object) -> None:
    with pytest.raises(UserError) as caught:
        build(ExperimentConfig, {"algorithm": {"name": "mine:Own", "own": value}})
    assert str(caught.value).isprintable()


# -- what is written is read back --------------------------------------------------------------------------------------


def _built(schema: type[Any], raw: Any) -> Any:
    """A valid object, or no example: rules over several keys may be broken."""
    try:
        return resolved_space(raw) if schema is Space else build(schema, raw)
    except UserError:
        assume(False)


EXPERIMENTS = valid(ExperimentConfig)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(EXPERIMENTS)
def test_an_experiment_is_read_back_as_written(raw: dict[str, Any]) -> None:
    config = _built(ExperimentConfig, raw)
    assert build(ExperimentConfig, parse_yaml(config.to_yaml())) == config
    assert build(ExperimentConfig, parse_yaml(to_yaml(raw))) == config


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from([s for s in SECTIONS if s not in (ExperimentConfig, Space)]).flatmap(
        lambda s: st.tuples(st.just(s), valid(s))
    )
)
def test_every_section_is_read_back_as_written(drawn: tuple[type[Section], dict[str, Any]]) -> None:
    section, raw = drawn
    built = _built(section, raw)
    assert build(section, parse_yaml(to_yaml(built.model_dump(mode="json")))) == built


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    valid(Space),
    st.dictionaries(
        st.sampled_from(["lora.rank", "training.lr"]), st.lists(st.integers(1, 9), min_size=1, unique=True), min_size=1
    ),
)
def test_a_space_is_read_back_as_written(raw: dict[str, Any], grids: dict[str, list[int]]) -> None:
    parameters = {key: {"grid": values} for key, values in grids.items()}
    space = _built(Space, raw | {"parameters": parameters, "search": {}})
    assert resolved_space(parse_yaml(space.to_yaml())) == space  # type: ignore[arg-type]


def test_a_pretraining_config_is_read_back() -> None:
    config = build(PretrainConfig, {"dataset": {"name": "digits"}, "attack": {"epsilon": "8/255"}})
    assert build(PretrainConfig, parse_yaml(to_yaml(config.model_dump(mode="json")))) == config


# -- overrides ---------------------------------------------------------------------------------------------------------

VALUES = {
    "3": 3,
    "1e-3": 0.001,
    "true": True,
    "yes": "yes",
    "1:30": "1:30",
    "017": 17,
    "2026-01-31": "2026-01-31",
    "8/255": "8/255",
    "null": None,
    "": "",
    "run #3": "run #3",
    "a: b": "a: b",
    "C:\\data": "C:\\data",
    '"3"': "3",
    "'a'": "a",
    "[a, 1:30]": ["a", "1:30"],
    "{a: yes}": {"a": "yes"},
}


@pytest.mark.parametrize("text", VALUES)
def test_the_value_of_an_override_is_that_of_a_file(text: str) -> None:
    key, value = parse_override(f"a.b={text}")
    assert (key, value) == ("a.b", VALUES[text])
    assert type(value) is type(VALUES[text])


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("evaluation: {attacks: [{name: fgsm}, {steps: 3}]}\n")
    return path


def test_an_entry_of_a_list_is_changed_by_its_number(config_file: Path) -> None:
    config = load_config(config_file, ["evaluation.attacks.0.epsilon=4/255", "evaluation.attacks.1={steps: 5}"])
    assert [spec.label for spec in config.evaluation.specs] == ["fgsm-eps4", "pgd5-eps8"]


OVERRIDES = {
    "training.lr": "must be KEY=VALUE",
    "=1": "must be KEY=VALUE",
    "a..b=1": "a part before, between or after the dots is empty",
    ".lr=1": "a part before, between or after the dots is empty",
    "training.=1": "a part before, between or after the dots is empty",
    "training. .lr=1": "a part before, between or after the dots is empty",
    "a." * 40 + "b=1": "at most 32 parts",
    "training\0.lr=1": "must be printable",
    "training\n.lr=1": "must be printable",
    "training.lr=[1": "is not valid YAML",
    "training.lr={a: 1, a: 2}": "the key 'a' is given twice",
    "training.lr=!!python/name:os.system": "the tag",
    "training.lr=*a": "*a stands for",
    "evaluation.attacks.2.steps=3": "'2' is not an entry of the list there, which has 0 to 1",
    "evaluation.attacks.-1.steps=3": "'-1' is not an entry",
    "evaluation.attacks.steps=3": "which has 0 to 1, e.g. evaluation.attacks.0.steps",
    "evaluation.attacks.²=3": "'²' is not an entry",
    "evaluation.attacks.0.steps.x=3": "evaluation.attacks.0.steps",
    "lora.target_modules.0=a": "must be a list",
    "training.lr=" + "9" * 5000: "5,000 characters",
    "name=" + "x" * 200: "at most 100 characters",
    "tracking.run_name=a\0b": "one line of printable",
    "Training.lr=1": "did you mean 'training'",
    "training.LR=1": "unknown key",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override[:30].encode("unicode_escape").decode())
def test_a_wrong_override_is_one_line(override: str, config_file: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file, [override])
    assert OVERRIDES[override] in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


# -- whole files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# a comment\n"])
def test_an_empty_file_runs_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"is empty or damaged.*`dataset: {name: digits}`"):
        load_config(tmp_path / "config.yaml")


def test_the_smallest_config_that_the_message_shows_is_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("dataset: {name: digits}")
    assert load_config(tmp_path / "config.yaml") == ExperimentConfig()


class OwnParameters(Section):
    """The parameters of somebody's own method, whose checks raise plain errors."""

    width: int = 9
    depth: int = 0

    @field_validator("width", "depth")
    @classmethod
    def _check_one(cls, value: int) -> int:
        if value in (1, 2):
            raise AssertionError(*["must not be 1"] * (value == 1))
        if value > 5:
            raise ValueError("must be at most 5")
        if value == 5:
            raise ValueError
        return value

    @model_validator(mode="after")
    def _check_together(self) -> OwnParameters:
        if self.depth > self.width:
            raise ValueError("is deeper than wide")
        return self


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"width": 7}, "algorithm.width = 7: must be at most 5"),
        ({}, "algorithm.width = 9: must be at most 5"),
        ({"width": 5}, "algorithm.width = 5: is not valid"),
        ({"width": 1}, "algorithm.width = 1: must not be 1"),
        ({"width": 2}, "algorithm.width = 2: is not valid"),
        ({"width": 3, "depth": 4}, "algorithm = {'width': 3, 'depth': 4}: is deeper than wide"),
    ],
)
def test_a_plain_error_of_a_check_is_one_line_about_the_setting(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(OwnParameters, raw, "algorithm")
    assert str(caught.value) == message


def test_a_mapping_that_contains_itself_is_one_line() -> None:
    endless: dict[str, Any] = {}
    endless["parameters"] = {"lora.rank": endless}
    with pytest.raises(UserError, match=r"^\S+ = .*(without end|more than)") as caught:
        sylva_ray.load_config({"algorithm": endless})
    assert "Ellipsis" not in str(caught.value)


def test_a_section_that_is_given_twice_is_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {rounds: 2}\nlora: {rank: 2}\ntraining: {lr: 0.1}\n")
    with pytest.raises(UserError, match=r"line 3: the key 'training' is given twice \(first in line 1\)"):
        load_config(tmp_path / "config.yaml")


def test_a_mapping_of_the_caller_is_not_changed() -> None:
    raw = {"evaluation": {"attacks": [{"name": "fgsm"}]}}
    config = sylva_ray.load_config(raw, ["evaluation.attacks.0.epsilon=4/255"])
    assert config.evaluation.specs[0].label == "fgsm-eps4"
    assert raw == {"evaluation": {"attacks": [{"name": "fgsm"}]}}


def test_every_method_takes_its_own_defaults_from_yaml() -> None:
    from sylva_ray.algorithms.registry import ALGORITHMS

    for name in ALGORITHMS:
        parameters = create_algorithm(build(ExperimentConfig, {"algorithm": {"name": name}}).algorithm).parameters
        written = to_yaml({"algorithm": {"name": name} | parameters.model_dump(mode="json")})
        read = create_algorithm(build(ExperimentConfig, parse_yaml(written)).algorithm).parameters
        assert read == parameters

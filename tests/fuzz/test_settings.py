"""Configurations, overrides, attacks on the command line, and spaces of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.config.attacks import parse_attack
from sylva_ray.config.experiment import ExperimentConfig, load_config
from sylva_ray.config.stored import load_run_config
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import AttackSpec
from sylva_ray.core.yaml import to_yaml
from sylva_ray.preparation.resolve import resolve_trial
from sylva_ray.pretraining.config import PretrainConfig, load_pretrain_config
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.points import planned_trials
from sylva_ray.sweeps.space import Space, load_space
from tests.fuzz.outcome import outcome
from tests.fuzz.settings import PIECES, PLAIN, TEXTS, WRONG, damaged, texts_like, valid


def _experiment(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The configuration, and all that is checked without data and model."""
    config = load_config(path, overrides)
    create_algorithm(config.algorithm)
    return resolve_trial(config)


@given(texts_like(valid(ExperimentConfig)))
@example(b"")
@example(b"algorithm: {name: ':x'}")
@example(b"algorithm: {name: '.a:x'}")
@example(b"algorithm: {name: 'os:path.join'}")
def test_a_config_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    config = outcome(lambda: _experiment(path), untouched=tmp_path)
    if isinstance(config, ExperimentConfig):
        path.write_text(config.to_yaml())
        assert outcome(lambda: load_run_config(tmp_path)) == config


@given(texts_like(valid(PretrainConfig)))
def test_a_pretraining_config_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_bytes(content)
    outcome(lambda: load_pretrain_config(path, []), untouched=tmp_path)


@given(valid(ExperimentConfig).flatmap(damaged))
def test_a_mapping_of_the_python_interface(raw: Any) -> None:
    import sylva_ray

    if isinstance(raw, dict):
        outcome(lambda: sylva_ray.load_config(raw))


def _dotted_keys(section: Any, prefix: str = "") -> list[str]:
    keys = []
    for key, value in section.items():
        keys += [f"{prefix}{key}", *(_dotted_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return keys


KEYS = st.sampled_from(
    [*_dotted_keys(ExperimentConfig().model_dump()), "evaluation.attacks.0.epsilon", "evaluation.attacks.9", "a..b"]
)
ASSIGNED = (WRONG | PLAIN).map(lambda value: to_yaml(value).strip()) | TEXTS | PIECES
OVERRIDES = st.tuples(KEYS | TEXTS | PIECES, st.sampled_from(["=", "==", "", ".x=", ".0="]), ASSIGNED).map("".join)


@given(st.lists(OVERRIDES, min_size=1, max_size=3))
def test_overrides(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("evaluation: {attacks: [{name: fgsm}]}")
    outcome(lambda: _experiment(path, overrides), untouched=tmp_path)


@given(
    st.sampled_from([*ATTACKS, "pgdd", ""]),
    st.lists(
        st.tuples(st.sampled_from(["steps", "epsilon", "norm", "loss", "x", ""]), ASSIGNED).map("=".join), max_size=3
    ),
)
def test_attacks_on_the_command_line(name: str, settings: list[str]) -> None:
    spec: AttackSpec | UserError = outcome(lambda: parse_attack(f"{name}:{','.join(settings)}"))
    assert isinstance(spec, UserError) or len(spec.label) < 1000


DOTTED = st.sampled_from(
    [
        "lora.rank",
        "training.lr",
        "attack.epsilon",
        "algorithm",
        "algorithm.name",
        "seed",
        "lora",
        "a..b",
        "evaluation.attacks.0",
    ]
)
PARAMETER = st.dictionaries(
    st.sampled_from(["grid", "choice", "uniform", "loguniform", "randint"]),
    st.lists(PLAIN | WRONG | st.integers(1, 9) | st.floats(0.001, 1), max_size=3),
    min_size=1,
    max_size=1,
)
SPACES = st.builds(
    lambda space, parameters: space | {"parameters": parameters},
    valid(Space),
    st.dictionaries(DOTTED, PARAMETER, max_size=3),
)


def _space(path: Path, overrides: Sequence[str]) -> Space:
    """The space with the experiment of its first trial."""
    space = load_space(path, overrides)
    if space.search.kind != "optuna":
        first = planned_trials(space)[0]
        space.config(first.values, first.seed)
    return space


@given(texts_like(SPACES), st.lists(OVERRIDES, max_size=1))
def test_a_space_of_a_sweep(tmp_path: Path, content: bytes, overrides: list[str]) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    space = outcome(lambda: _space(path, overrides), untouched=tmp_path)
    if isinstance(space, Space):
        path.write_text(space.to_yaml())
        assert outcome(SweepFolder(tmp_path).load) == space

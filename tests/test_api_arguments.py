"""Arguments of the Python interface that no command line could pass: a line that names it, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sylva_ray
from sylva_ray import api
from sylva_ray.api.arguments import check_count, check_list
from sylva_ray.core.errors import UserError

CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "overrides that are a text": (lambda: sylva_ray.load_config({}, "seed=1"), "overrides = 'seed=1': must be a list"),
    "overrides that are no texts": (lambda: sylva_ray.load_config({}, [1]), "overrides = [1]: must be a list of texts"),  # type: ignore[list-item]
    "overrides of a resume": (lambda: sylva_ray.resume("a", "seed=1"), "overrides = 'seed=1': must be a list"),
    "overrides of a sweep": (lambda: sylva_ray.sweep("a", "seed=1"), "overrides = 'seed=1': must be a list"),
    "overrides of tracking": (lambda: api.track("a", "seed=1"), "overrides = 'seed=1': must be a list"),
    "attacks that are a text": (
        lambda: sylva_ray.evaluate("a", "pgd:steps=3"),
        "attacks = 'pgd:steps=3': must be a list",
    ),
    "surrogates that are a path": (
        lambda: sylva_ray.evaluate("a", surrogates=Path("b")),  # type: ignore[arg-type]
        "must be a list: ['b']",
    ),
    "sources that are a text": (lambda: sylva_ray.compare("runs/a"), "sources = 'runs/a': must be a list: ['runs/a']"),
    "a noise level that is a number": (
        lambda: sylva_ray.evaluate("a", certify=0.12),  # type: ignore[arg-type]
        "certify = 0.12: must be a list: [0.12]",
    ),
    "a rank that is a number": (lambda: sylva_ray.traffic(ranks=8), "ranks = 8: must be a list: [8]"),  # type: ignore[arg-type]
    "one class": (lambda: sylva_ray.traffic(num_classes=1), "num_classes = 1: must be a whole number of at least 2"),
    "no client": (lambda: sylva_ray.traffic(num_clients=0), "num_clients = 0: must be a whole number of at least 1"),
    "a name that is a number": (lambda: sylva_ray.describe(5), "name = 5: must be a text"),  # type: ignore[arg-type]
    "an unknown show": (
        lambda: sylva_ray.run({}, show="loud"),  # type: ignore[arg-type]
        "show = 'loud': must be one of tasks, progress, result",
    ),
    "settings of a method that conflict": (
        lambda: sylva_ray.run({"algorithm": {"name": "hetlora_at", "factors": "b"}}),
        "algorithm.factors = 'b': has no products B A",
    ),
    "a warm-up that is needed": (
        lambda: sylva_ray.run({"algorithm": {"name": "pm_afl", "head_warmup_epochs": 0}}),
        "algorithm.head_warmup_epochs = 0: must be at least 1",
    ),
    "settings of two sections that conflict": (
        lambda: sylva_ray.load_config({"byzantine": {"attack": "nan", "fraction": 0.1, "strength": 2}}),
        "byzantine.strength = 2.0: has no effect on nan",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_argument(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, says = CASES[case]
    with pytest.raises(UserError) as caught:
        call()
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "Ellipsis" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "resume", "out", "says"),
    [
        ("nowhere", True, None, "no such run folder"),
        ("cifar10", True, None, "needs --out FOLDER"),
        ("empty", False, None, "is a folder without config.yaml"),
        ("empty", False, "new", "is a folder without config.yaml"),
        ("run", False, None, "use --resume to continue"),
        ("~/run", False, None, "use --resume to continue"),
        ("s3://bucket/run", False, None, "is a URL"),
    ],
)
def test_a_source_that_says_too_little_is_refused(
    config: str, resume: bool, out: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source_folders(tmp_path, monkeypatch))
    with pytest.raises(UserError, match=says):
        sylva_ray.check_source(config, resume, out)


@pytest.mark.parametrize(
    ("config", "resume", "out"),
    [
        ("digits", False, None),
        ("digits", True, "old"),
        ("run", True, None),
        ("~/run", True, None),
        ("run", False, "new"),
        ("s3://bucket/run", True, None),
        ("nowhere.yaml", False, None),  # the command says that there is no such file
    ],
)
def test_a_source_that_says_enough_is_taken(
    config: str, resume: bool, out: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source_folders(tmp_path, monkeypatch))
    sylva_ray.check_source(config, resume, out)


def source_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a run, an empty folder and one named like a recipe."""
    for name in ("run", "empty", "digits"):
        (root / name).mkdir()
    (root / "run" / "config.yaml").write_text("name: run\n")
    monkeypatch.setenv("HOME", str(root))
    return root


def test_numbers_of_numpy_are_numbers() -> None:
    check_list("certify", np.array([0.12]))
    check_list("certify", [np.float32(0.1), 1])
    check_count("num_clients", np.int64(3))
    with pytest.raises(UserError):
        check_count("num_clients", True)
    with pytest.raises(UserError):
        check_list("certify", "0.12")

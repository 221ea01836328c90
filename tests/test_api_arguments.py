"""Arguments of the Python interface that no command line could pass: a line that names it, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sylva_ray
from sylva_ray import api
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
    "an unknown show": (lambda: sylva_ray.run({}, show="loud"), "show = 'loud': must be one of tasks, progress, result"),  # type: ignore[arg-type]
    "no images": (lambda: sylva_ray.evaluate("a", images=0), "images = 0: must be an integer of at least 1"),
    "negative images": (lambda: sylva_ray.evaluate("a", images=-4), "images = -4: must be an integer of at least 1"),
    "images that are true": (lambda: sylva_ray.evaluate("a", images=True), "images = True: must be an integer"),
    "no config": (lambda: sylva_ray.load_config(None), "config = None: must be a YAML file, a run folder"),  # type: ignore[arg-type]
    "a config at a URL": (lambda: sylva_ray.run("s3://a/b"), "config = 's3://a/b': is a URL, which only `resume`"),
    "nothing to resume": (lambda: sylva_ray.resume("nowhere"), "'nowhere': holds no run to resume"),
    "a key that is a number": (lambda: sylva_ray.load_config({1: 2}), "must be a name"),  # type: ignore[dict-item]
    "a name with a space": (
        lambda: sylva_ray.load_config({"name": "a b"}),
        "name = 'a b': must consist of letters, digits, '.', '_' and '-'",
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

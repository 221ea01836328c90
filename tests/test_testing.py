"""The contract tests that users run on their own parts: they pass the examples and find what is broken."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import sylva_ray
from sylva_ray import testing
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.attacks.base import LinfAttack
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.state import AttackState
from sylva_ray.config.data import DatasetSection
from sylva_ray.config.experiment import AlgorithmSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec
from sylva_ray.data import own
from sylva_ray.data.datasets import load_dataset
from sylva_ray.data.own import sources_of, to_image

ROOT = Path(__file__).parents[1]

BROKEN = """
import numpy as np

def too_many(labels, section, rng):
    return np.full(len(labels), section.num_clients)

def fractions(labels, section, rng):
    return labels / 2

def unseeded(labels, section, rng):
    return np.random.default_rng().integers(section.num_clients, size=len(labels))

def greedy(labels, section, rng):
    labels[:] = 0
    return rng.integers(section.num_clients, size=len(labels))

class Moody:
    targets = [0, 1] * 40
    def __len__(self): return 80
    def __getitem__(self, row): return np.random.default_rng().integers(255, size=(8, 8, 3), dtype=np.uint8), 0

def moody(): return Moody(), Moody()
def half(): return Moody()
def fails(): raise RuntimeError("no disk")
number = 3
"""


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "a_broken.py").write_text(BROKEN)
    yield tmp_path
    sys.modules.pop("a_broken", None)


def test_the_examples_keep_their_contracts() -> None:
    assert len((ROOT / "examples" / "own_parts.py").read_text().splitlines()) < 60
    testing.check_dataset("examples.own_parts:stripes", imports=[ROOT])
    testing.check_partition("examples.own_parts:by_class", imports=[ROOT])


@pytest.mark.slow
def test_the_example_of_a_method_keeps_its_contract() -> None:
    testing.check_method("examples.margin_at:MarginAT", imports=[ROOT])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("too_many", r"outside 0\.\.3"),
        ("fractions", "one integer per image"),
        ("unseeded", "the generator that it gets"),
        ("greedy", "must stay as they are"),
        ("number", "must be a function"),
    ],
)
def test_a_broken_partition_is_found(name: str, says: str, broken: Path) -> None:
    with pytest.raises((UserError, AssertionError), match=says):
        testing.check_partition(f"a_broken:{name}", imports=[broken])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("moody", "the same image every time"),
        ("half", r"must return \(train, test\)"),
        ("fails", "no disk"),
        ("number", "must be a function"),
    ],
)
def test_a_broken_data_set_is_found(name: str, says: str, broken: Path) -> None:
    with pytest.raises((UserError, AssertionError), match=says):
        testing.check_dataset(f"a_broken:{name}", imports=[broken])


def test_code_of_a_data_set_runs_only_where_the_user_allows_it(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(broken)
    with pytest.raises(UserError, match=r"--import \."):
        load_dataset(DatasetSection(name="a_broken:moody"), 32, seed=0)


class Columns:
    """What a data set of Hugging Face can do, as far as it is used."""

    column_names = ("img", "label")

    def __init__(self) -> None:
        names = type("ClassLabel", (), {"names": ["cat", "dog"]})()
        self.features = {"img": object(), "label": names}
        self.rows = [{"img": Image.new("RGB", (4, 4), (row, 0, 0)), "label": row % 2} for row in range(6)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> object:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def test_a_data_set_of_hugging_face_is_read_by_its_columns_and_class_names() -> None:
    sources = sources_of("x:y", (Columns(), Columns()))
    assert sources.class_names == ("cat", "dog")
    assert sources.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert np.asarray(sources.test.image(5))[0, 0].tolist() == [5, 0, 0]


def test_a_torch_data_set_gives_tensors_and_labels() -> None:
    import torch
    from torch.utils.data import TensorDataset

    pixels = torch.rand(4, 3, 5, 5)
    sources = sources_of("x:y", [TensorDataset(pixels, torch.tensor([0, 1, 2, 1]))] * 2)
    assert sources.train.labels.tolist() == [0, 1, 2, 1]
    assert sources.class_names == ("0", "1", "2")
    expected = (255 * pixels[2]).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(sources.train.image(2)), expected)


def test_halves_that_name_their_classes_differently_are_refused() -> None:
    class Named(list[tuple[object, int]]):
        def __init__(self, *classes: str) -> None:
            super().__init__((np.zeros((4, 4), np.uint8), number) for number in range(len(classes)))
            self.classes = list(classes)

    train = Named("ant", "bee", "cat")
    assert sources_of("x:y", (train, Named("ant", "bee", "cat"))).class_names == ("ant", "bee", "cat")
    with pytest.raises(UserError, match="class 1 is 'bee' in the training half and 'cat' in the test half"):
        sources_of("x:y", (train, Named("ant", "cat")))
    assert sources_of("x:y", (train, Named("ant", "bee"))).class_names == ("ant", "bee", "cat"), "the labels agree"
    unnamed = [(np.zeros((4, 4), np.uint8), 0)]
    for halves in ((train, unnamed), (unnamed, train)):
        assert sources_of("x:y", halves).class_names == ("ant", "bee", "cat")


def test_an_image_that_cannot_be_read_is_named() -> None:
    import torch

    class Broken(list[tuple[Any, int]]):
        targets = (0, 1)

        def __getitem__(self, row: Any) -> Any:
            if row:
                raise FileNotFoundError("photo1.jpg")
            return torch.rand(3, 4, 4, requires_grad=True).to(torch.bfloat16), 0

    half = Broken([(None, 0), (None, 1)])
    source = sources_of("x:y", (half, half)).train
    assert source.image(0).size == (4, 4)
    with pytest.raises(UserError, match=r"training half, row 1': cannot be read \(FileNotFoundError: photo1.jpg\)"):
        source.image(1)
    with pytest.raises(UserError, match=r"row 0': is an array of shape \[0, 4\]"):
        to_image(np.zeros((0, 4), np.uint8), "row 0")


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (np.zeros((4, 6), np.uint8), "L"),
        (np.zeros((4, 6, 3), np.uint8), "RGB"),
        (np.zeros((3, 4, 6), np.uint8), "RGB"),
        (np.zeros((1, 4, 6), np.float32), "L"),
    ],
)
def test_arrays_become_images(array: np.ndarray, mode: str) -> None:
    image = to_image(array, "x")
    assert (image.mode, image.size) == (mode, (6, 4))


@pytest.mark.parametrize(
    "array", [np.full((3, 4, 4), -1.0), np.zeros((4, 4), np.int64), np.zeros((2, 4, 4, 3), np.uint8)]
)
def test_normalised_or_odd_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(UserError, match="not normalised"):
        to_image(array, "x")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package as pip would install it, with an entry point for a data set and for a method; returns its name."""
    (tmp_path / "a_plugin.py").write_text(
        "from examples.margin_at import MarginAT\nfrom examples.own_parts import stripes\nNUMBER = 3\n"
    )
    information = tmp_path / "a_plugin-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[sylva_ray.datasets]\nstriped = a_plugin:stripes\n\n"
        "[sylva_ray.methods]\nmargin = a_plugin:MarginAT\nno_method = a_plugin:NUMBER\nlost = a_plugin:nothing\n"
    )
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "a_plugin", raising=False)
    return "a_plugin"


def test_parts_of_installed_packages_are_found_by_their_short_names(installed: str) -> None:
    assert load_dataset(DatasetSection(name="striped"), image_size=32, seed=0).class_names[0] == "horizontal"
    method = create_algorithm(AlgorithmSection(name="margin"))
    assert type(method) is sys.modules[installed].MarginAT


@pytest.mark.parametrize(("name", "says"), [("no_method", "is no method. Expected"), ("lost", "cannot be imported")])
def test_an_entry_point_to_something_else_is_one_line(installed: str, name: str, says: str) -> None:
    del installed
    with pytest.raises(UserError, match=says):
        create_algorithm(AlgorithmSection(name=name))


@pytest.mark.parametrize("name", ["attack", "backbone", "rule", "tracker"])
def test_every_example_of_a_part_is_short(name: str) -> None:
    assert len((ROOT / "examples" / f"own_{name}.py").read_text().splitlines()) < 60


def test_the_other_examples_keep_their_contracts() -> None:
    testing.check_attack("examples.own_attack:SignMomentum", {"epsilon": "16/255"}, imports=[ROOT])
    testing.check_backbone("examples.own_backbone:vit_pico", imports=[ROOT])
    testing.check_rule("examples.own_rule:drop_long", imports=[ROOT])


def forget(module: str) -> None:
    """Make a module one that no code of this process has imported."""
    sys.modules.pop(module, None)


@pytest.mark.long
def test_a_run_of_nothing_but_own_parts_and_what_it_leaves(tmp_path: Path) -> None:
    config = testing.TINY | {
        "algorithm": {"name": "fedavg_at_ft", "model": "lora", "robust": {"rule": "examples.own_rule:drop_long"}},
        "dataset": {"name": "examples.own_parts:stripes", "max_train": 120, "max_test": 40},
        "backbone": {"name": "examples.own_backbone:vit_pico"},
        "evaluation": {
            "attacks": [{"name": "examples.own_attack:SignMomentum", "epsilon": "4/255", "steps": 2}],
            "precision": "float32",
            "checks": False,
        },
        "tracking": {"enabled": False, "observers": ["examples.own_tracker:Csv"]},
    }
    summary = sylva_ray.run(config, out=tmp_path / "run", imports=[ROOT], show="nothing")
    label = "SignMomentum2-eps4"
    assert summary.final.robust_accuracy[label].mean <= summary.final.benign_accuracy.mean
    assert f"final/robust_accuracy/{label}/mean" in (tmp_path / "run" / "metrics.csv").read_text()
    forget("examples.own_attack")
    assert label in sylva_ray.load_run(tmp_path / "run").config.evaluation.specs[0].label, "needs no code"
    sylva_ray.report(tmp_path / "run")
    with pytest.raises(UserError, match="--import"):
        sylva_ray.evaluate(tmp_path / "run", attacks=["examples.own_attack:SignMomentum:steps=1"])
    found = sylva_ray.evaluate(
        tmp_path / "run", attacks=["examples.own_attack:SignMomentum:steps=3"], imports=[ROOT], show="nothing"
    )
    assert "SignMomentum3-eps4" in found.attacks

    script = tmp_path / "run" / "adapters" / "load.py"
    code = f"import runpy; m = runpy.run_path({str(script)!r}); print(type(m['load']('client_000')).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip().startswith("Peft"), done.stderr


class Sideways(LinfAttack):
    """Adversarial for one image because of another: takes a step that depends on the whole batch."""

    display_name: ClassVar[str] = "sideways"

    def spec(self) -> AttackSpec:
        return AttackSpec(self.name, self.epsilon, 1, self.epsilon)

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        del draws
        rows = state.remaining()
        state.logits((state.x[rows] + spec.epsilon * (state.x.mean() - 0.5).sign() * state.x.std()).clamp(0, 1), rows)
        _, gradient, _ = state.gradient(state.x[rows], rows, lambda logits, at: cross_entropy(logits, state.y[at]))
        noise = gradient.sign() * (1 - state.x.mean())
        state.logits((state.x[rows] + spec.epsilon * noise).clamp(0, 1), rows)


class Unseeded(Sideways):
    """Draws from somewhere else."""

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        del draws
        rows = state.remaining()
        for _ in range(20):
            state.logits((state.x[rows] + spec.epsilon * torch.randn_like(state.x[rows]).sign()).clamp(0, 1), rows)
            rows = state.remaining()


class Idle(Sideways):
    """Does nothing."""

    @classmethod
    def run(cls, state: AttackState, spec: AttackSpec, draws: ImageDraws) -> None:
        """Find nothing."""


@pytest.mark.parametrize(
    ("name", "says"),
    [("Sideways", "images of others"), ("Unseeded", "the draws that it gets"), ("Idle", "must ask the model")],
)
def test_an_attack_that_breaks_a_rule_is_found(name: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        testing.check_attack(f"{__name__}:{name}", {"epsilon": 0.2})


def favourite(gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Take the first client."""
    del num_byzantine
    return np.eye(len(gram))[0]


def too_few(gram: np.ndarray, num_byzantine: int) -> np.ndarray:
    """Return a number for every honest client."""
    return np.ones(len(gram) - num_byzantine)


def test_a_rule_or_a_backbone_that_breaks_a_rule_is_found() -> None:
    with pytest.raises(AssertionError, match="order of the clients"):
        testing.check_rule(f"{__name__}:favourite")
    with pytest.raises(UserError, match=r"one finite coefficient per upload, \[9\], and returned \[7\]"):
        testing.check_rule(f"{__name__}:too_few")
    with pytest.raises(UserError, match="register_model"):
        testing.check_backbone(f"{__name__}:favourite")


def test_objects_of_the_process_are_a_data_set(tmp_path: Path) -> None:
    sys.path.append(str(ROOT))
    from examples.own_parts import Stripes

    sylva_ray.add_dataset("my-stripes", Stripes(120, seed=0), Stripes(40, seed=1))
    config = testing.TINY | {"algorithm": {"name": "undefended"}, "dataset": {"name": "my-stripes"}}
    summary = sylva_ray.run(config, out=tmp_path / "run", show="nothing")
    assert summary.dataset == "my-stripes"
    assert summary.class_names[0] == "horizontal"
    own._added.clear()  # as in another process
    with pytest.raises(UserError, match=r"sylva_ray\.add_dataset"):
        sylva_ray.evaluate(tmp_path / "run", attacks=["fgsm"])
    with pytest.raises(UserError, match="begin with a letter"):
        sylva_ray.add_dataset("a/b", Stripes(4, seed=0), Stripes(4, seed=0))
    with pytest.raises(UserError, match="has no __getitem__"):
        sylva_ray.add_dataset("numbers", {1, 2}, {3})
    with pytest.raises(UserError, match="numbers, training half': is empty"):
        sylva_ray.add_dataset("numbers", [], [])
    with pytest.raises(UserError, match="numbers, training half': has labels of type float64"):
        sylva_ray.add_dataset("numbers", [(0, 0.5)], [(0, 1)])

"""Contract tests for parts of your own, which raise `AssertionError` or `UserError` where a part breaks a rule.

::

    from sylva_ray import testing

    def test_my_parts():
        testing.check_attack("my_package.attacks:MyAttack", imports=["src"])
        testing.check_backbone("my_package.models:my_vit", imports=["src"])
        testing.check_dataset("my_package.data:flowers", imports=["src"])
        testing.check_partition("my_package.data:by_hospital", imports=["src"])
        testing.check_method("my_package.methods:MyMethod", imports=["src"])
        testing.check_observer("my_package.trackers:MyTracker", imports=["src"])
        testing.check_rule("my_package.rules:my_rule", imports=["src"])
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sylva_ray.aggregation.robust import combination
from sylva_ray.attacks.registry import attack_stack, find_attack
from sylva_ray.config.data import DatasetSection, PartitionSection
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.own_code import importing_from
from sylva_ray.core.seeding import ImageDraws, numpy_generator
from sylva_ray.core.types import ClientImages, ParameterStack
from sylva_ray.core.windows import Window
from sylva_ray.data.datasets import find_dataset, load_dataset
from sylva_ray.data.partition import own_partition, partition_labels

__all__ = [
    "check_attack",
    "check_backbone",
    "check_dataset",
    "check_method",
    "check_observer",
    "check_partition",
    "check_rule",
]

Imports = Sequence[str | Path]

TINY: dict[str, Any] = {
    "dataset": {"name": "digits", "max_train": 120, "max_test": 40},
    "backbone": {"image_size": 16},
    "partition": {"num_clients": 3, "alpha": 1.0, "min_samples": 15, "test_samples": 8},
    "attack": {"epsilon": "4/255", "steps": 1},
    "training": {"rounds": 1, "batch_size": 16, "precision": "float32", "attention": "fused"},
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 1}], "precision": "float32", "checks": False},
    "cluster": {"pool": "in_process"},
    "tracking": {"enabled": False},
}
"""A run of seconds in one process."""


class _Linear:
    """Logits of a random matrix per client, to be attacked; a wave makes the gradient differ from point to point."""

    precision = torch.float32

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("nd,nkd->nk", x.flatten(1) - 0.5, params["weight"][owner])
        return logits + 0.3 * torch.sin(3 * logits)


def check_attack(name: str, settings: dict[str, Any] | None = None, *, imports: Imports = ()) -> None:
    """Check an attack of your own: it asks the model, it is repeatable, and images do not influence each other.

    Args:
        name: ``package.module:Class``.
        settings: which differ from their defaults; the data are 10 images for each of two clients.
        imports: directories of your code.

    Raises:
        UserError: it cannot be imported, or its settings are wrong.
        AssertionError: it breaks a rule.
    """
    rng = torch.Generator().manual_seed(0)
    params = {"weight": torch.randn(2, 4, 3 * 8 * 8, generator=rng)}
    x, owner = torch.rand(20, 3, 8, 8, generator=rng), torch.arange(20) // 10
    y = _Linear().forward(params, x, owner).argmax(1)
    images, draws = ClientImages(x, y, owner, 2), ImageDraws(torch.arange(20))
    with importing_from(imports):
        spec = build(find_attack(name), {"name": name, **(settings or {})}, "attack").spec()
        whole, again = (attack_stack(_Linear(), params, images, spec, draws) for _ in range(2))
        second = Window(slice(10, 20), slice(1, 2))
        alone = attack_stack(_Linear(), second.select(params), images.part(second), spec, draws.select(slice(10, 20)))
    assert whole.forwards > 20, "it must ask the model, by state.logits or state.gradient"
    assert torch.equal(whole.x_adv, again.x_adv), "all random numbers must come from the draws that it gets"
    assert torch.allclose(whole.x_adv[10:], alone.x_adv, atol=1e-5), "images of others must not change a result"
    assert torch.equal(x, images.x), "the images that it gets must stay as they are"


def check_backbone(name: str, *, imports: Imports = ()) -> None:
    """Check a backbone of your own: it can be built, trained, stacked for several clients, and loaded by PEFT.

    Args:
        name: ``package.module:function``.
        imports: directories of your code.

    Raises:
        UserError: it cannot; says why.
    """
    from sylva_ray.preparation.experiment import prepare

    with importing_from(imports):
        prepare(build(ExperimentConfig, TINY | {"backbone": {"name": name}}), measure=False)


def check_rule(name: str, *, imports: Imports = ()) -> None:
    """Check a robust aggregation rule of your own: it agrees with itself, and does not depend on the clients' order.

    Args:
        name: ``package.module:function``.
        imports: directories of your code.

    Raises:
        UserError: it cannot be imported, or does not return a finite coefficient for every client.
        AssertionError: it breaks a rule.
    """
    rng = np.random.default_rng(0)
    updates, order = rng.normal(size=(9, 40)), rng.permutation(9)
    updates[2] *= 100
    gram = updates @ updates.T
    with importing_from(imports):
        one, other = (combination(name, gram, num_byzantine=2) for _ in range(2))
        moved = combination(name, gram[np.ix_(order, order)], num_byzantine=2)
    assert np.array_equal(one, other), "equal updates must have equal coefficients every time"
    assert np.allclose(moved, one[order]), "the coefficients must not depend on the order of the clients"


def check_dataset(name: str, *, image_size: int = 32, imports: Imports = ()) -> None:
    """Check a data set of your own: it has labels and images, and is the same when it is loaded again.

    Args:
        name: ``package.module:function``.
        image_size: side to which images are resized that are not all of one square size.
        imports: directories of your code.

    Raises:
        UserError: it breaks a rule of `sylva_ray.data.own`.
        AssertionError: it is not the same twice.
    """
    section = DatasetSection(name=name, max_train=64, max_test=32)
    with importing_from(imports):
        loaded, again = (load_dataset(section, image_size, seed=0) for _ in range(2))
        labels = find_dataset(section).labels(seed=0)
    for half, other, alone in ((loaded.train, again.train, labels.train), (loaded.test, again.test, labels.test)):
        assert half.images.dtype == np.uint8, "images are stored in 8 bits"
        assert half.images.shape[1:] == (3, loaded.image_size, loaded.image_size), "images are square"
        assert np.array_equal(half.labels, alone), "labels do not depend on whether images are read"
        assert np.array_equal(half.images, other.images), "the same row must be the same image every time"
        assert np.array_equal(half.labels, other.labels), "the same row must have the same label every time"
    assert half.images.std() > 0, "all pixels are the same"


def check_partition(name: str, *, num_clients: int = 4, num_classes: int = 5, imports: Imports = ()) -> None:
    """Check a partition of your own: every image has one client, and equal generators give equal results.

    Args:
        name: ``package.module:function``.
        num_clients: of the test.
        num_classes: of the test.
        imports: directories of your code.

    Raises:
        UserError: it does not return a client for every image.
        AssertionError: it changes the labels, or draws from another generator than the one that it gets.
    """
    section = PartitionSection(kind=name, num_clients=num_clients, min_samples=5)
    labels = np.arange(60 * num_classes) % num_classes
    before = labels.copy()
    with importing_from(imports):
        draw = own_partition(name)
        one, other = (draw(labels, section, numpy_generator(3, "contract")) for _ in range(2))
        parts = partition_labels(labels, section, seed=3)
    assert np.array_equal(labels, before), "the labels that it gets must stay as they are"
    assert np.array_equal(one, other), "all random numbers must come from the generator that it gets"
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels))), "every image has one client"


def check_method(name: str, parameters: dict[str, Any] | None = None, *, imports: Imports = ()) -> None:
    """Check a method of your own by two tiny runs (some ten seconds): it trains, and equal runs give equal results.

    Args:
        name: ``package.module:Class``.
        parameters: of the method, which differ from their defaults.
        imports: directories of your code.

    Raises:
        UserError: it cannot be imported, or its parameters are wrong.
        AssertionError: its states are not finite, did not change, or differ between equal runs.
    """
    import sylva_ray

    config = TINY | {"algorithm": {"name": name} | (parameters or {})}
    with tempfile.TemporaryDirectory() as folder:
        loaded = []
        for run in ("first", "second"):
            sylva_ray.run(config, out=f"{folder}/{run}", imports=imports, show="nothing")
            loaded.append(sylva_ray.load_run(f"{folder}/{run}").states)
    for client, (state, other) in enumerate(zip(*loaded, strict=True)):
        assert all(np.isfinite(value).all() for value in state.values()), f"client {client} has values without number"
        same = all(np.array_equal(value, other[key]) for key, value in state.items())
        assert same, f"client {client} differs between equal runs: draw from batch.draws"
    assert any(np.any(value != 0) for value in loaded[0][0].values()), "nothing was trained"


def check_observer(name: str, *, imports: Imports = ()) -> None:
    """Check an observer of your own by a tiny run (some five seconds): none of its methods fails.

    Args:
        name: as in ``tracking.observers``.
        imports: directories of your code.

    Raises:
        UserError: it cannot be imported, or is no observer.
        AssertionError: one of its methods failed.
    """
    import sylva_ray

    config = TINY | {"algorithm": {"name": "fedavg_at"}, "tracking": {"enabled": False, "observers": [name]}}
    with tempfile.TemporaryDirectory() as folder:
        summary = sylva_ray.run(config, out=f"{folder}/run", imports=imports, show="nothing")
    problems = [text for text in summary.warnings if text.startswith("the observer ")]
    assert not problems, problems[0]

"""Contract tests for parts of your own, which raise `AssertionError` or `UserError` where a part breaks a rule.

::

    from sylva_ray import testing

    def test_my_parts():
        testing.check_dataset("my_package.data:flowers", imports=["src"])
        testing.check_partition("my_package.data:by_hospital", imports=["src"])
        testing.check_method("my_package.methods:MyMethod", imports=["src"])
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sylva_ray.config.experiment import DatasetSection, PartitionSection
from sylva_ray.core.own_code import importing_from
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.data.datasets import find_dataset, load_dataset
from sylva_ray.data.partition import own_partition, partition_labels

__all__ = ["check_dataset", "check_method", "check_observer", "check_partition"]

Imports = Sequence[str | Path]

TINY: dict[str, Any] = {
    "dataset": {"name": "digits", "max_train": 120, "max_test": 40},
    "partition": {"num_clients": 3, "alpha": 1.0, "min_samples": 15, "test_samples": 8},
    "attack": {"epsilon": "4/255", "steps": 1},
    "training": {"rounds": 1, "batch_size": 16, "precision": "float32", "attention": "fused"},
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 1}], "precision": "float32", "checks": False},
    "cluster": {"pool": "in_process"},
    "tracking": {"enabled": False},
}
"""A run of seconds in one process."""


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

"""Data sets with a name: scikit-learn's digits and those that torchvision downloads."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sylva_ray.core.errors import UserError
from sylva_ray.data.sources import Source, Sources, stratified_halves

TORCHVISION = ("cifar10", "cifar100", "stl10", "gtsrb")
DIGITS = "sklearn/datasets/data/digits.csv.gz"
"""The file in the installed scikit-learn: one row per image, 64 pixels and the label."""

PUBLISHED = {
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "stl10": (5_000, 8_000, 10),
    "gtsrb": (26_640, 12_630, 43),
}
"""Training images, test images and classes of the data sets that torchvision downloads."""


def read_digits() -> Sources:
    """Read scikit-learn's 1,797 digits, 8 x 8 in 0..16, and enlarge them to 32 x 32; the test half is stratified.

    The installed file is read directly: `sklearn.datasets.load_digits` returns the same after seconds of importing.
    """
    table = np.loadtxt(str(distribution("scikit-learn").locate_file(DIGITS)), delimiter=",")
    images = [
        Image.fromarray((image * 255 / 16).round().astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR)
        for image in table[:, :-1].reshape(-1, 8, 8)
    ]
    digits = Source(table[:, -1].astype(np.int64), lambda row: images[row], lambda row: f"digits, row {row}")
    return Sources(*stratified_halves(digits), tuple(map(str, range(10))))


def read_torchvision(name: str, root: Path) -> Sources:
    """Read a data set of torchvision, which is downloaded if it is not there.

    Args:
        name: one of `TORCHVISION`.
        root: the folder of its files.

    Raises:
        UserError: the files are not there and cannot be downloaded.
    """
    from torchvision import datasets as tv

    makers: dict[str, Callable[[bool, bool], Any]] = {
        "cifar10": lambda train, fetch: tv.CIFAR10(root, train=train, download=fetch),
        "cifar100": lambda train, fetch: tv.CIFAR100(root, train=train, download=fetch),
        "stl10": lambda train, fetch: tv.STL10(root, split="train" if train else "test", download=fetch),
        "gtsrb": lambda train, fetch: tv.GTSRB(root, split="train" if train else "test", download=fetch),
    }

    def half(train: bool) -> Any:
        try:
            return makers[name](train, False)
        except (RuntimeError, OSError):  # the files are missing or incomplete
            try:
                return makers[name](train, True)
            except Exception as error:
                reason = f"is not in {root} and could not be downloaded ({type(error).__name__})"
                raise UserError("dataset.name", name, f"{reason}; copy it there, or use parquet:PATH") from None

    halves = half(True), half(False)
    train, test = (_torchvision_source(half, f"{name} in {root}") for half in halves)
    names = tuple(getattr(halves[0], "classes", None) or map(str, range(int(train.labels.max()) + 1)))
    return Sources(train, test, names)


def _torchvision_source(half: Any, key: str) -> Source:
    labels = next((getattr(half, name) for name in ("targets", "labels") if hasattr(half, name)), None)
    if labels is None:  # GTSRB stores its labels with the file names only
        files = [Path(file) for file, _ in half._samples]
        labels = np.array([label for _, label in half._samples], np.int64)
        return Source(labels, lambda row: files[row], lambda row: str(files[row]))
    return Source(np.asarray(labels, np.int64), lambda row: half[row][0], lambda row: f"{key}, row {row}")

"""Load data sets by name: scikit-learn's digits, torchvision's, image folders, and parquet files of Hugging Face.

The result has two `Split`s of uint8 pixels at one square size. The model resizes them to its own size and normalises
them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sylva_ray.config.experiment import DatasetSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import Split

if TYPE_CHECKING:
    import pyarrow as pa

TORCHVISION = ("cifar10", "cifar100", "stl10", "gtsrb")
DIGITS = "sklearn/datasets/data/digits.csv.gz"
"""The file in the installed scikit-learn: one row per image, 64 pixels and the label."""

TEST_FRACTION = 0.2
"""Fraction of the images that becomes the test half of a data set without one."""

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm"}
"""Suffixes of the files that an image folder is searched for."""

PUBLISHED = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100), "stl10": (5_000, 8_000, 10)}
PUBLISHED["gtsrb"] = (26_640, 12_630, 43)
"""Training images, test images and classes of the data sets that torchvision downloads."""

Decode = Callable[[int], Image.Image]
"""Returns the image of a row; called for the rows that are used only."""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: as in the configuration.
        train: ``images [n, 3, S, S] uint8`` and labels in 0..num_classes-1.
        test: likewise.
        class_names: the classes, in the order of their labels.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without an image."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Side S of the images in pixels."""
        return int(self.train.images.shape[-1])


@dataclass(frozen=True)
class _Source:
    """One half of a data set, its images not decoded yet."""

    labels: np.ndarray
    decode: Decode


def load_dataset(section: DatasetSection, image_size: int, seed: int) -> Dataset:
    """Load a data set, or a class-balanced subset of it.

    Args:
        section: the name, where the files are, and the sizes of the subset.
        image_size: side in pixels to resize to if the images are not all of one square size.
        seed: seed of the subset.

    Raises:
        UserError: the name is unknown, or the files are missing or cannot be read.
    """
    train, test, names = _sources(section)
    may_keep = _may_be_square(section)
    splits = []
    for purpose, source in (("train", train), ("test", test)):
        _check_labels(source.labels, len(names), section.name, purpose)
    train_rows = _subset(train.labels, section.max_train, seed, "train")
    if section.test_pool == "train":
        test, test_rows = train, _held_out(train.labels, train_rows, section, seed)
    else:
        test_rows = _subset(test.labels, section.max_test, seed, "test")
    for source, rows in ((train, train_rows), (test, test_rows)):
        # Photographs are resized one by one: all of them at full size would not fit into memory.
        images = [_square(_decoded(source, row, section.name), None if may_keep else image_size) for row in rows]
        splits.append((images, source.labels[rows]))
    sizes = {image.size for images, _ in splits for image in images}
    keep = len(sizes) == 1 and all(width == height for width, height in sizes)
    halves = [Split(_pixels(images, None if keep else image_size), labels) for images, labels in splits]
    return Dataset(section.name, halves[0], halves[1], names)


@dataclass(frozen=True)
class DatasetSize:
    """The size of a data set in memory.

    Attributes:
        num_train: training images.
        num_test: test images.
        num_classes: classes.
        image_size: side of the images in pixels.
    """

    num_train: int
    num_test: int
    num_classes: int
    image_size: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the pixels and labels of both splits."""
        return (self.num_train + self.num_test) * (3 * self.image_size**2 + 8)


def measure_dataset(section: DatasetSection, image_size: int) -> DatasetSize:
    """Return the size of what `load_dataset` would return, decoding one image at most and downloading nothing.

    Args:
        section: as for `load_dataset`.
        image_size: as for `load_dataset`.

    Raises:
        UserError: as `load_dataset`, except for data sets that torchvision downloads.
    """
    if section.name in PUBLISHED:
        in_train, in_test, num_classes = PUBLISHED[section.name]
        side = 32 if _may_be_square(section) else image_size
    else:
        train, test, names = _sources(section)
        in_train, in_test, num_classes = len(train.labels), len(test.labels), len(names)
        first = _square(_decoded(train, 0, section.name), None if _may_be_square(section) else image_size)
        side = first.width if first.width == first.height else image_size
    num_train = min(section.max_train or in_train, in_train)
    if section.test_pool == "train":
        in_test = in_train - num_train
    return DatasetSize(num_train, min(section.max_test or in_test, in_test), num_classes, side)


def _may_be_square(section: DatasetSection) -> bool:
    """Return whether the images may be of one square size, which is then kept."""
    return section.name.partition(":")[0] not in ("imagefolder", "stl10", "gtsrb")


# -- sources -----------------------------------------------------------------------------------------------------------


def _sources(section: DatasetSection) -> tuple[_Source, _Source, tuple[str, ...]]:
    """Return the training half, the test half and the names of the classes."""
    kind, _, path = section.name.partition(":")
    if section.name == "digits":
        train, test, names = _digits()
    elif section.name in TORCHVISION:
        train, test, names = _torchvision(kind, section)
    elif kind == "imagefolder":
        train, test, names = _imagefolder(_existing(section.name, path))
    elif kind == "parquet":
        train, test, names = _parquet(_existing(section.name, path))
    else:
        known = ", ".join(("digits", *TORCHVISION, "imagefolder:PATH", "parquet:PATH"))
        raise UserError("dataset.name", section.name, f"unknown data set; known are {known}")
    if len(names) < 2:
        raise UserError("dataset.name", section.name, f"has {len(names)} class; a classifier needs at least 2")
    return train, test, names


def _digits() -> tuple[_Source, _Source, tuple[str, ...]]:
    """Read scikit-learn's 1,797 digits, 8 x 8 in 0..16, and enlarge them to 32 x 32; the test half is stratified.

    The installed file is read directly: `sklearn.datasets.load_digits` returns the same after seconds of importing.
    """
    table = np.loadtxt(str(distribution("scikit-learn").locate_file(DIGITS)), delimiter=",")
    images = [
        Image.fromarray((image * 255 / 16).round().astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR)
        for image in table[:, :-1].reshape(-1, 8, 8)
    ]
    labels = table[:, -1].astype(np.int64)
    train, test = _stratified_halves(labels)
    names = tuple(map(str, range(10)))
    return _Source(labels[train], lambda r: images[train[r]]), _Source(labels[test], lambda r: images[test[r]]), names


def _torchvision(name: str, section: DatasetSection) -> tuple[_Source, _Source, tuple[str, ...]]:
    from torchvision import datasets as tv

    root = Path(section.root).expanduser()
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
    train, test = map(_torchvision_source, halves)
    names = tuple(getattr(halves[0], "classes", None) or map(str, range(int(train.labels.max()) + 1)))
    return train, test, names


def _torchvision_source(half: Any) -> _Source:
    labels = next((getattr(half, name) for name in ("targets", "labels") if hasattr(half, name)), None)
    if labels is None:  # GTSRB stores its labels with the file names only
        labels = [label for _, label in half._samples]
    return _Source(np.asarray(labels, np.int64), lambda row: half[row][0])


def _imagefolder(root: Path) -> tuple[_Source, _Source, tuple[str, ...]]:
    """Read PATH/train and PATH/test (or val, valid) with a folder per class; or folders per class, which are split."""
    key = f"imagefolder:{root}"
    train_root = root / "train"
    test_root = next((root / name for name in ("test", "val", "valid") if (root / name).is_dir()), None)
    top = train_root if train_root.is_dir() else root
    names = _class_folders(top)
    files, labels = _listing(top, names)
    if not files:
        raise UserError("dataset.name", key, "has no images; expected PATH/[train/]CLASS/*.png or .jpg")
    if train_root.is_dir():
        if test_root is None:
            raise UserError("dataset.name", key, "has train/ but neither test/ nor val/")
        if untrained := sorted(set(_class_folders(test_root)) - set(names)):
            raise UserError("dataset.name", key, f"has class {untrained[0]!r} in {test_root.name}/ but not in train/")
        test_files, test_labels = _listing(test_root, names)
        return _Source(labels, lambda r: _open(files[r])), _Source(test_labels, lambda r: _open(test_files[r])), names
    train, test = _stratified_halves(labels)
    return (
        _Source(labels[train], lambda r: _open(files[train[r]])),
        _Source(labels[test], lambda r: _open(files[test[r]])),
        names,
    )


def _class_folders(root: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _listing(root: Path, names: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((root / name).glob("**/*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    return [path for path, _ in files], np.array([label for _, label in files], np.int64)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders of damaged files raise errors of many types
        raise UserError("dataset.name", str(path), f"is not a readable image ({error})") from None


def _parquet(root: Path) -> tuple[_Source, _Source, tuple[str, ...]]:
    """Read parquet files of Hugging Face: a struct column with ``bytes`` of images, and an integer column of labels."""
    key = f"parquet:{root}"
    train, names = _parquet_half(root, ("train",), key)
    test, test_names = _parquet_half(root, ("test", "valid", "validation"), key)
    if names != test_names:
        raise UserError("dataset.name", key, "has other class names in its training files than in its test files")
    highest = int(max(train.labels.max(initial=0), test.labels.max(initial=0)))
    return train, test, names or tuple(map(str, range(highest + 1)))


def _parquet_half(root: Path, prefixes: Sequence[str], key: str) -> tuple[_Source, tuple[str, ...]]:
    import pyarrow as pa  # here, as every process that receives the data imports this module
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    files = next((found for p in prefixes if (found := sorted(root.glob(f"{p}-*.parquet")))), None)
    if files is None:
        raise UserError("dataset.name", key, f"has no {' or '.join(f'{p}-*.parquet' for p in prefixes)}")
    try:
        table = pa.concat_tables([pq.read_table(file) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise UserError("dataset.name", key, f"is not readable parquet ({str(error).splitlines()[0]})") from None
    image = next(
        (f.name for f in table.schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0), None
    )
    features = _huggingface_features(table.schema)
    integers = [f.name for f in table.schema if pa.types.is_integer(f.type)]
    label = next((name for name in integers if "names" in features.get(name, {})), integers[0] if integers else None)
    if image is None or label is None:
        columns = ", ".join(table.column_names)
        fix = f"needs an image struct column with `bytes` and an integer label column; found {columns}"
        raise UserError("dataset.name", key, fix)
    pixels = pc.struct_field(table[image], "bytes")
    labels = pc.fill_null(table[label], -1).to_numpy().astype(np.int64)
    names = tuple(features.get(label, {}).get("names", ()))
    return _Source(labels, lambda row: Image.open(io.BytesIO(pixels[row].as_py())).convert("RGB")), names


def _huggingface_features(schema: pa.Schema) -> Mapping[str, Mapping[str, Sequence[str]]]:
    """Return what Hugging Face's metadata says of the columns; of class labels the ``names``."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError):
        return {}


# -- common to all sources ---------------------------------------------------------------------------------------------


def _check_labels(labels: np.ndarray, num_classes: int, name: str, purpose: str) -> None:
    if not len(labels):
        raise UserError("dataset.name", name, f"has no {purpose} images")
    if labels.min() < 0 or labels.max() >= num_classes:
        fix = f"has {purpose} labels that are empty or outside 0..{num_classes - 1}"
        raise UserError("dataset.name", name, fix)


def _decoded(source: _Source, row: int, name: str) -> Image.Image:
    try:
        return source.decode(int(row))
    except UserError:  # it names the file
        raise
    except Exception as error:  # decoders of damaged files raise errors of many types
        raise UserError("dataset.name", name, f"row {row} is not a readable image ({error})") from None


def _existing(name: str, path: str) -> Path:
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError("dataset.name", name, "no such folder")
    return root


def _stratified_halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a data set that has no test half: return the sorted rows of training and of test, stratified by class.

    The halves do not depend on the experiment's seed, as in data sets that have both.
    """
    rng = numpy_generator(0, "test half")
    test = [rows[: round(TEST_FRACTION * len(rows))] for rows in _rows_by_class(labels, rng)]
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _subset(labels: np.ndarray, limit: int | None, seed: int, purpose: str) -> np.ndarray:
    """Return all rows, or a seeded, class-balanced choice of ``limit`` of them, sorted."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    shuffled = _rows_by_class(labels, numpy_generator(seed, f"subset/{purpose}"))
    # one row of each class in turn
    ranked = [(rank, label, row) for label, rows in enumerate(shuffled) for rank, row in enumerate(rows[:limit])]
    return np.sort([row for _, _, row in sorted(ranked)[:limit]])


def _held_out(labels: np.ndarray, taken: np.ndarray, section: DatasetSection, seed: int) -> np.ndarray:
    """Return at most ``max_test`` of the training rows that are not ``taken``."""
    rest = np.setdiff1d(np.arange(len(labels)), taken)
    if not len(rest):
        fix = f"must leave some training images for dataset.test_pool=train; there are {len(labels):,}"
        raise UserError("dataset.max_train", section.max_train, fix)
    held_out: np.ndarray = rest[_subset(labels[rest], section.max_test, seed, "held out")]
    return held_out


def _rows_by_class(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]


def _pixels(images: Sequence[Image.Image], size: int | None) -> np.ndarray:
    """Return ``[n, 3, S, S] uint8``; see `_square` for ``size``."""
    return np.stack([np.asarray(_square(image, size).convert("RGB")).transpose(2, 0, 1) for image in images])


def _square(image: Image.Image, size: int | None) -> Image.Image:
    """Resize the shorter side to ``size`` and crop the centre; None keeps the image as it is."""
    if size is None or image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))

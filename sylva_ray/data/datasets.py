"""Load data sets by name: scikit-learn's digits, torchvision's, image folders, and parquet files of Hugging Face.

The result has two `Split`s of uint8 pixels at one square size. The model resizes them to its own size and normalises
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from sylva_ray.config.data import DatasetSection, Leftovers
from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import local_path
from sylva_ray.core.own_code import entry_points_of
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.text import one_line
from sylva_ray.core.types import Split
from sylva_ray.data.folders import read_folder
from sylva_ray.data.own import GROUP, is_added, read_own
from sylva_ray.data.published import PUBLISHED, TORCHVISION, read_digits, read_torchvision
from sylva_ray.data.sources import Source, Sources, missing_class_notices, mixed_order, rows_by_class


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: as in the configuration.
        train: ``images [n, 3, S, S] uint8`` and labels in 0..num_classes-1.
        test: likewise.
        class_names: the classes, in the order of their labels.
        notices: what the user should know about the files, one sentence each.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    notices: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without an image."""
        return len(self.class_names)

    @property
    def labels(self) -> Labels:
        """The labels alone."""
        return Labels(self.name, self.train.labels, self.test.labels, self.class_names)

    @property
    def image_size(self) -> int:
        """Side S of the images in pixels."""
        return int(self.train.images.shape[-1])


@dataclass(frozen=True)
class Labels:
    """The labels of a data set.

    Attributes:
        name: of the data set, as in the configuration.
        train: ``[n] int64``, in 0..num_classes-1.
        test: likewise.
        class_names: the classes, in the order of their labels.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class FoundDataset:
    """A data set whose files have been found and whose labels have been read.

    Attributes:
        section: its name, where the files are, and the sizes of the subset.
        sources: both halves.
    """

    section: DatasetSection
    sources: Sources

    def load(self, image_size: int, seed: int, leftovers: Leftovers = "random") -> Dataset:
        """Decode the images, or those of a class-balanced subset.

        Args:
            image_size: side in pixels to resize to if the images are not all of one square size, or larger.
            seed: seed of the subset.
            leftovers: as in `PartitionSection`.

        Raises:
            UserError: an image cannot be read.
        """
        chosen = self._chosen(seed, leftovers)
        images = _decoded(chosen, image_size, _may_be_square(self.section))
        train, test = (_split(part, source.labels[rows]) for part, (source, rows) in zip(images, chosen, strict=True))
        names = self.sources.class_names
        is_subset = self.section.max_train is not None or self.section.max_test is not None
        key = f"{self.section.name} (a subset: dataset.max_train, max_test)" if is_subset else self.section.name
        missing = missing_class_notices(key, train.labels, test.labels, names)
        return Dataset(self.section.name, train, test, names, self.sources.notices + tuple(map(one_line, missing)))

    def labels(self, seed: int, leftovers: Leftovers = "random") -> Labels:
        """Return the labels of what `load` returns, without decoding an image."""
        train, test = (source.labels[rows] for source, rows in self._chosen(seed, leftovers))
        train, test = (labels[mixed_order(labels)] for labels in (train, test))
        return Labels(self.section.name, train, test, self.sources.class_names)

    def _chosen(self, seed: int, leftovers: Leftovers) -> list[tuple[Source, np.ndarray]]:
        """Return the sources of the training half and the test half, and the rows of each."""
        section, train, test = self.section, self.sources.train, self.sources.test
        train_rows = _subset(train.labels, section.max_train, seed, "train", leftovers)
        if section.test_pool == "train":
            return [(train, train_rows), (train, _held_out(train.labels, train_rows, section, seed, leftovers))]
        return [(train, train_rows), (test, _subset(test.labels, section.max_test, seed, "test", leftovers))]


def find_dataset(section: DatasetSection) -> FoundDataset:
    """Find the files of a data set and read its labels, without a model; `FoundDataset.load` decodes images.

    Raises:
        UserError: the name is unknown, or the files are missing or cannot be read.
    """
    return FoundDataset(section, _sources(section))


def load_dataset(section: DatasetSection, image_size: int, seed: int, leftovers: Leftovers = "random") -> Dataset:
    """Load a data set: `find_dataset`, then `FoundDataset.load`.

    Raises:
        UserError: the name is unknown, or the files are missing or cannot be read.
    """
    return find_dataset(section).load(image_size, seed, leftovers)


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
        side = min(32, image_size) if _may_be_square(section) else image_size
    else:
        sources = _sources(section)
        in_train, in_test = len(sources.train.labels), len(sources.test.labels)
        num_classes = len(sources.class_names)
        first = sources.train.image(0)
        is_kept = _may_be_square(section) and first.width == first.height <= image_size
        side = first.width if is_kept else image_size
    num_train = min(section.max_train or in_train, in_train)
    if section.test_pool == "train":
        in_test = in_train - num_train
    return DatasetSize(num_train, min(section.max_test or in_test, in_test), num_classes, side)


def _may_be_square(section: DatasetSection) -> bool:
    """Return whether the images may be of one square size, which is then kept."""
    return section.name.partition(":")[0] not in ("imagefolder", "stl10", "gtsrb")


def _sources(section: DatasetSection) -> Sources:
    """Return both halves of a data set, with labels that have a class."""
    sources = _read(section)
    name, num_classes = section.name, len(sources.class_names)
    if not len(sources.train.labels):
        raise UserError("dataset.name", name, "has no training images")
    if num_classes < 2:
        raise UserError("dataset.name", name, f"has {num_classes} class; a classifier needs at least 2")
    if not len(sources.test.labels):
        fix = "has no test images; without a test split, a class needs at least 3 images, of which a fifth becomes one"
        raise UserError("dataset.name", name, fix)
    for source, half in ((sources.train, "training"), (sources.test, "test")):
        if source.labels.min() < 0 or source.labels.max() >= num_classes:
            raise UserError("dataset.name", name, f"has {half} labels outside 0..{num_classes - 1}")
    return replace(sources, notices=tuple(map(one_line, sources.notices)))


def _read(section: DatasetSection) -> Sources:
    kind, _, path = section.name.partition(":")
    if section.name == "digits":
        return read_digits()
    if section.name in TORCHVISION:
        return read_torchvision(section.name, local_path("dataset.root", section.root))
    if kind == "imagefolder":
        return read_folder(_existing(section.name, path))
    if kind == "parquet":
        from sylva_ray.data.parquet import read_parquet  # it imports pyarrow, which few processes need

        return read_parquet(_existing(section.name, path), section.label, section.image)
    is_own = ":" in section.name and kind != "digits" and kind not in TORCHVISION
    if is_own or is_added(section.name) or section.name in entry_points_of(GROUP):
        return read_own(section.name)
    known = ", ".join(("digits", *TORCHVISION, "imagefolder:PATH", "parquet:PATH", "package.module:function"))
    fix = f"unknown data set; known are {known}, and those that sylva_ray.add_dataset was called with in this process"
    raise UserError("dataset.name", section.name, fix)


def _existing(name: str, path: str) -> Path:
    if not path:
        raise UserError("dataset.name", name, "no such folder")
    root = local_path("dataset.name", path)
    if root.is_file():
        raise UserError("dataset.name", name, f"is a file; name the folder that contains it, {root.parent}")
    if not root.is_dir():
        raise UserError("dataset.name", name, "no such folder")
    return root


def _subset(labels: np.ndarray, limit: int | None, seed: int, purpose: str, leftovers: Leftovers) -> np.ndarray:
    """Return all rows, or a seeded, class-balanced choice of ``limit`` of them, sorted."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    rng = numpy_generator(seed, f"subset/{purpose}")
    shuffled = rows_by_class(labels, rng)
    # one row of each class in turn; the last turn may not reach all classes
    turn = rng.permutation(len(shuffled)) if leftovers == "random" else np.arange(len(shuffled))
    ranked = [(rank, turn[label], row) for label, rows in enumerate(shuffled) for rank, row in enumerate(rows[:limit])]
    return np.sort([row for _, _, row in sorted(ranked)[:limit]])


def _held_out(
    labels: np.ndarray, taken: np.ndarray, section: DatasetSection, seed: int, leftovers: Leftovers
) -> np.ndarray:
    """Return at most ``max_test`` of the training rows that are not ``taken``."""
    rest = np.setdiff1d(np.arange(len(labels)), taken)
    if not len(rest):
        fix = f"must leave some training images for dataset.test_pool=train; there are {len(labels):,}"
        raise UserError("dataset.max_train", section.max_train, fix)
    held_out: np.ndarray = rest[_subset(labels[rest], section.max_test, seed, "held out", leftovers)]
    return held_out


def _decoded(chosen: Sequence[tuple[Source, np.ndarray]], image_size: int, may_keep: bool) -> list[list[Image.Image]]:
    """Decode the chosen rows of each half; all images have one size afterwards.

    Photographs are resized one by one: all of them at full size would not fit into memory.

    Args:
        chosen: sources and their rows.
        image_size: side in pixels to resize to.
        may_keep: whether images that are all of one square size, at most that of the model, are kept as they are. Of
            larger ones the model would see a few pixels only: it resizes without a filter, as attacks need it.
    """
    halves: list[list[Image.Image]] = []
    kept: int | None = None
    for source, rows in chosen:
        halves.append([])
        for row in rows:
            image = source.image(row)
            kept = kept or image.width
            if may_keep and (image.size != (kept, kept) or kept > image_size):
                may_keep = False
                halves = [[_square(earlier, image_size, source.where(row)) for earlier in half] for half in halves]
            halves[-1].append(image if may_keep else _square(image, image_size, source.where(row)))
    return halves


def _split(images: Sequence[Image.Image], labels: np.ndarray) -> Split:
    """Return images and labels in the order of `mixed_order`."""
    order = mixed_order(labels)
    return Split(_pixels([images[row] for row in order]), labels[order])


def _pixels(images: Sequence[Image.Image]) -> np.ndarray:
    """Return images of one size as ``[n, 3, S, S] uint8``."""
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])


def _square(image: Image.Image, size: int, where: str) -> Image.Image:
    """Resize the shorter side to ``size`` and crop the centre.

    Args:
        image: of any size.
        size: of the result.
        where: names the image in messages.

    Raises:
        UserError: the image is so narrow that it would become too large before it is cropped.
    """
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > (Image.MAX_IMAGE_PIXELS or float("inf")):
        fix = f"is too narrow to be cropped to a square of {size} pixels: {image.width} x {image.height}"
        raise UserError("dataset.name", where, fix)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))

"""What every reader of a data set returns: labels, and images that are decoded when they are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.text import shortened
from sylva_ray.data.images import ImageError, decode_image, to_rgb

TEST_FRACTION = 0.2
"""Fraction of the images that becomes the test half of a data set without one."""

SPELLINGS = {
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst"),
    "validation": ("val", "valid", "validation"),
    "evaluation": ("eval", "evaluation"),
    "development": ("dev",),
}
"""Splits of a data set and their spellings. Of all but the first, the first one that exists is the test half."""

SUFFIXES_OF_SPLITS = ("set", "split", "data", "images")
"""Words that may follow a split's name, as in ``training_set``."""

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One half of a data set, its images not decoded yet.

    Attributes:
        labels: ``[n] int64``.
        read: returns the image of a row: its file, the content of its file, or an image with 8 bits per channel.
        where: names the image of a row in messages.
    """

    labels: np.ndarray
    read: Callable[[int], Path | bytes | Image.Image]
    where: Callable[[int], str]

    def image(self, row: int) -> Image.Image:
        """Return the image of a row, of mode RGB.

        Raises:
            UserError: it cannot be decoded.
        """
        try:
            content = self.read(int(row))
            return to_rgb(content) if isinstance(content, Image.Image) else decode_image(content)
        except ImageError as error:
            raise UserError("dataset.name", self.where(int(row)), str(error)) from None

    def rows(self, rows: np.ndarray) -> Source:
        """Return some of the rows, in the order of ``rows``."""
        return Source(self.labels[rows], lambda row: self.read(rows[row]), lambda row: self.where(rows[row]))


@dataclass(frozen=True)
class Sources:
    """Both halves of a data set.

    Attributes:
        train: the training half.
        test: the test half.
        class_names: the classes, in the order of their labels.
        notices: what a reader did not use or finds unusual, one sentence each.
    """

    train: Source
    test: Source
    class_names: tuple[str, ...]
    notices: tuple[str, ...] = ()


def stratified_halves(source: Source) -> tuple[Source, Source]:
    """Split a data set that has no test half, stratified by class; the rows of both halves keep their order.

    The halves do not depend on the experiment's seed, as in data sets that have both.
    """
    rng = numpy_generator(0, "test half")
    test = [rows[: round(TEST_FRACTION * len(rows))] for rows in rows_by_class(source.labels, rng)]
    chosen = np.sort(np.concatenate(test))
    return source.rows(np.setdiff1d(np.arange(len(source.labels)), chosen)), source.rows(chosen)


def rows_by_class(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the rows of each class that occurs, in random order."""
    return [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]


def mixed_order(labels: np.ndarray) -> np.ndarray:
    """Return the order in which images are used: as they come, unless they come class by class.

    Parts of a client's images are taken from the front (`evaluation.max_samples`, for instance), and should have images
    of all its classes. An order in which the class changes less than half as often as by chance, as in a folder per
    class, is replaced by a random one, which is always the same.

    Args:
        labels: ``[n] int64``.

    Returns:
        ``[n] int``, a permutation of the rows.

    >>> mixed_order(np.array([0, 1, 1, 0, 1, 0])).tolist(), mixed_order(np.repeat([0, 1], 3)).tolist()
    ([0, 1, 2, 3, 4, 5], [2, 1, 3, 0, 5, 4])
    """
    rows = np.arange(len(labels))
    shares = np.bincount(labels) / len(labels)
    by_chance = (1 - shares @ shares) * (len(labels) - 1)
    if np.count_nonzero(np.diff(labels)) >= by_chance / 2:
        return rows
    return numpy_generator(0, "order of images").permutation(rows)


def split_of(name: str) -> str | None:
    """Return the split that a folder's or a file's name stands for, a key of `SPELLINGS`; None: it is no split.

    >>> split_of("Train"), split_of("training_set"), split_of("val"), split_of("trainer")
    ('train', 'train', 'validation', None)
    """
    word = "".join(letter for letter in name.casefold() if letter not in "-_ ")
    words = {word, *(word.removesuffix(suffix) for suffix in SUFFIXES_OF_SPLITS)}
    return next((split for split, spellings in SPELLINGS.items() if words.intersection(spellings)), None)


def splits_in(name: str) -> set[str]:
    """Return the splits that the words of a name stand for.

    >>> splits_in("seg_train"), splits_in("test_1"), splits_in("cats")
    ({'train'}, {'test'}, set())
    """
    return {split for word in re.split(r"[-_. ]+", name) if (split := split_of(word)) is not None}


@dataclass(frozen=True)
class Halves(Generic[T]):
    """The splits of a data set that are used.

    Attributes:
        train: what the training half is read from.
        test: what the test half is read from.
        notices: what is not used, one sentence each.
    """

    train: T
    test: T
    notices: tuple[str, ...]


def choose_halves(key: str, found: Mapping[str, Mapping[str, T]], expected: str) -> Halves[T]:
    """Choose the training half and the test half among the splits of a data set.

    Args:
        key: the data set, for messages.
        found: per split, what was found under each of its names.
        expected: what a data set must contain, for messages.

    Raises:
        UserError: a half is missing, or was found under two names.
    """
    candidates = [split for split in SPELLINGS if split != "train" and found.get(split)]
    if not found.get("train") or not candidates:
        names = [name for split in SPELLINGS for name in found.get(split, ())]
        has = f"has {shortened(names)} but no " if names else "has no "
        what = "training images" if not found.get("train") else "test images"
        raise UserError("dataset.name", key, f"{has}{what}; expected {expected}")
    chosen = ("train", candidates[0])
    for split in chosen:
        if len(found[split]) > 1:
            fix = f"has the {split} split twice, as {' and '.join(found[split])}; leave only one of them there"
            raise UserError("dataset.name", key, fix)
    (_, train), (test_name, test) = (next(iter(found[split].items())) for split in chosen)
    unused = [name for split in candidates[1:] for name in found[split]]
    notice = f"{key}: the test half is {test_name}; {shortened(unused)} is not read"
    return Halves(train, test, (notice,) if unused else ())


def is_hidden(name: str) -> bool:
    """Return whether a file or folder belongs to the operating system or to a tool, and never to a data set."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN")


def missing_class_notices(key: str, train: np.ndarray, test: np.ndarray, names: Sequence[str]) -> tuple[str, ...]:
    """Return sentences about classes without images.

    Args:
        key: the data set.
        train: labels of the training half.
        test: labels of the test half.
        names: of all classes.
    """
    notices = []
    for labels, half in ((train, "training"), (test, "test")):
        if missing := sorted(set(range(len(names))) - set(labels.tolist())):
            listed = shortened(
                f"{label} ({names[label]})" if names[label] != str(label) else label for label in missing
            )
            notices.append(f"{key}: {len(missing)} of {len(names)} classes have no {half} images: {listed}")
    return tuple(notices)

"""Data sets of the user's own: two halves, or a function ``package.module:function`` that returns them.

A half is a `torch.utils.data.Dataset` of pairs (image, label), or a `datasets.Dataset` of Hugging Face with the columns
``image`` and ``label``. Neither library is imported here: an object is told by what it can do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.own_code import load_own
from sylva_ray.data.sources import Source, Sources

GROUP = "sylva_ray.datasets"
"""The group of entry points."""

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
"""Columns of Hugging Face's data sets that hold images and labels."""


_added: dict[str, tuple[object, object]] = {}


def add_dataset(name: str, train: object, test: object) -> None:
    """See `sylva_ray.add_dataset`."""
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise UserError("dataset.name", name, "must consist of letters, digits, _ and -, and begin with a letter")
    sources_of(name, (train, test))
    _added[name] = (train, test)


def is_added(name: str) -> bool:
    """Return whether `add_dataset` was called with a name in this process."""
    return name in _added


def read_own(name: str) -> Sources:
    """Wrap what `add_dataset` was given, or what the user's function returns.

    Args:
        name: of an added data set, ``package.module:function``, or the name of an entry point.

    Raises:
        UserError: the function cannot be imported or fails, or does not return two halves.
    """
    if name in _added:
        return sources_of(name, _added[name])
    function = load_own("dataset.name", name, GROUP)
    needed = "must be a function without arguments that returns a training half and a test half"
    if not callable(function):
        raise UserError("dataset.name", name, needed)
    try:
        halves = function()
    except Exception as error:  # code that is not ours may raise anything
        fix = f"failed ({type(error).__name__}: {reason_of(error)}); it {needed}"
        raise UserError("dataset.name", name, fix) from None
    return sources_of(name, halves)


def sources_of(name: str, halves: object) -> Sources:
    """Return both halves of a data set of the user's own.

    Args:
        name: of the data set, for messages.
        halves: what the user's function returned.

    Raises:
        UserError: they are not a pair of data sets with labels, or name their classes differently.
    """
    if not isinstance(halves, Sequence) or isinstance(halves, str) or len(halves) != 2:
        raise UserError("dataset.name", name, f"must return (train, test), and returned {type(halves).__name__}")
    train, test = (_source(half, f"{name}, {word} half") for half, word in zip(halves, ("training", "test")))
    names, others = map(_class_names, halves)
    if names[: len(others)] != others and others[: len(names)] != names:
        number, (one, other) = next(
            (number, pair) for number, pair in enumerate(zip(names, others)) if pair[0] != pair[1]
        )
        fix = f"class {number} is {one!r} in the training half and {other!r} in the test half: they must be the same"
        raise UserError("dataset.name", name, fix)
    names = max(names, others, key=len) or tuple(map(str, range(int(train.labels.max()) + 1)))
    return Sources(train, test, names)


def _source(half: Any, where: str) -> Source:
    for needed in ("__len__", "__getitem__"):
        if not hasattr(half, needed):
            raise UserError("dataset.name", where, f"has no {needed}: it must be indexable, with a length")
    try:
        if not len(half):
            raise UserError("dataset.name", where, "is empty: it needs at least one image")
        image_at, labels = _columns(half, where) if hasattr(half, "column_names") else _pairs(half, where)
    except UserError:
        raise
    except Exception as error:  # the user's data set may raise anything
        raise UserError("dataset.name", where, f"cannot be read ({type(error).__name__}: {reason_of(error)})") from None
    if len(labels) != len(half):
        raise UserError("dataset.name", where, f"has {len(half):,} images and {len(labels):,} labels")

    def read(row: int) -> Image.Image:
        place = f"{where}, row {row}"
        try:
            value = image_at(row)
        except Exception as error:  # the user's data set may raise anything
            fix = f"cannot be read ({type(error).__name__}: {reason_of(error)})"
            raise UserError("dataset.name", place, fix) from error
        return to_image(value, place)

    return Source(labels, read, lambda row: f"{where}, row {row}")


def _columns(half: Any, where: str) -> tuple[Callable[[int], Any], np.ndarray]:
    """Return how an image is read, and the labels, of a data set of Hugging Face."""
    image, label = (
        next((name for name in names if name in half.column_names), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS)
    )
    if image is None or label is None:
        columns = ", ".join(half.column_names)
        fix = f"has the columns {columns}: it needs a column image and a column label; rename yours"
        raise UserError("dataset.name", where, fix)
    return lambda row: half[row][image], _labels(half[label], where)


def _pairs(half: Any, where: str) -> tuple[Callable[[int], Any], np.ndarray]:
    """Return how an image is read, and the labels, of a data set of PyTorch."""
    as_stored = getattr(half, "target_transform", None) is None  # otherwise a pair has another label
    known = next((getattr(half, name) for name in ("targets", "labels") if as_stored and hasattr(half, name)), None)
    labels = _labels([half[row][1] for row in range(len(half))] if known is None else known, where)
    return lambda row: half[row][0], labels


def _labels(values: Any, where: str) -> np.ndarray:
    labels = np.asarray(values)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        found = f"{labels.dtype} of shape {list(labels.shape)}"
        raise UserError("dataset.name", where, f"has labels of type {found}: they must be integers, one per image")
    return labels.astype(np.int64)


def _class_names(half: Any) -> tuple[str, ...]:
    features = getattr(half, "features", None)
    column = next((name for name in LABEL_COLUMNS if isinstance(features, Mapping) and name in features), None)
    names = getattr(features[column], "names", None) if column and features is not None else None
    return tuple(map(str, names or getattr(half, "classes", None) or ()))


def to_image(value: Any, where: str) -> Image.Image:
    """Convert an image to one of Pillow.

    Args:
        value: of Pillow; ``[H, W]`` or ``[H, W, 3] uint8``; or a tensor ``[1 or 3, H, W]``, uint8 or floats in [0, 1].
        where: names it in messages.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(value, Image.Image):
        return value
    if hasattr(value, "detach"):  # a tensor of torch, which may be on a GPU or of a type that numpy lacks
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if np.issubdtype(array.dtype, np.floating) and array.size and array.min() >= 0 and array.max() <= 1:
        array = (255 * array).round().astype(np.uint8)
    if (
        not array.size
        or array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 3))
    ):
        found = f"an array of shape {list(array.shape)} and type {array.dtype}"
        fix = f"is {found}: give an image of Pillow, uint8 [H, W, 3], or a tensor [3, H, W] in [0, 1], not normalised"
        raise UserError("dataset.name", where, fix)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)

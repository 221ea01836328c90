"""Read parquet files of images and labels, as Hugging Face and others write them.

Columns are chosen from the schemas alone. Then all labels are read, and images by row group where a row is used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.text import abbreviated, shortened
from sylva_ray.data.images import ImageError
from sylva_ray.data.parquet_columns import Columns, choose_columns
from sylva_ray.data.parquet_files import find_parquet
from sylva_ray.data.sources import Source, Sources

MAX_EMPTY_CLASSES = 1000
"""Without class names, labels may be this high; higher ones must be lower than the number of images."""


def read_parquet(root: Path, label: str | None, image: str | None) -> Sources:
    """Read a folder of parquet files.

    Args:
        root: the folder, which exists.
        label: the column of the labels; None: by rule (`sylva_ray.data.parquet_columns`).
        image: the column of the images; None: by rule.

    Raises:
        UserError: files are missing or damaged, no rule decides on a column, or the labels do not stand for classes.
    """
    key = f"parquet:{root}"
    found = find_parquet(root, key)
    files = [_File(path, str(path.relative_to(root)), key) for path in (*found.train, *found.test)]
    columns = _columns_of_all(files, key, label, image)
    halves = [_Half(part, columns, key) for part in (files[: len(found.train)], files[len(found.train) :])]
    if columns.label_kind == "text":
        names = tuple(sorted(set(halves[0].texts)))
        labels = [half.numbers_of_texts(names) for half in halves]
    else:
        labels = [half.numbers() for half in halves]
        names = columns.class_names or _numbered_classes(labels, columns, key)
        for half, numbers in zip(halves, labels, strict=True):
            half.check_range(numbers, len(names))
    train, test = (half.source(numbers) for half, numbers in zip(halves, labels, strict=True))
    return Sources(train, test, names, found.notices)


@contextmanager
def _reading(name: str, key: str) -> Iterator[None]:
    """Turn what a damaged file raises into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # pyarrow raises errors of many types for damaged files
        reason = reason_of(error)
        raise UserError("dataset.name", key, f"{name} is not readable parquet ({reason})") from None


class _File:
    """A parquet file, of which the schema and the sizes are read.

    Args:
        path: the file.
        name: its path below the data set's folder.
        key: the data set, for messages.

    Attributes:
        schema: of its columns.
        group_sizes: rows of each row group.
    """

    def __init__(self, path: Path, name: str, key: str) -> None:
        self.path, self.name, self.key = path, name, key
        with _reading(name, key), pq.ParquetFile(path) as file:
            self.schema: pa.Schema = file.schema_arrow
            metadata = file.metadata
            self.group_sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return sum(self.group_sizes)

    def read(self, column: str, group: int | None = None) -> pa.Array:
        """Return a column, or the part of it in one row group."""
        with _reading(self.name, self.key), pq.ParquetFile(self.path) as file:
            table = file.read([column]) if group is None else file.read_row_group(group, [column])
            expected = self.num_rows if group is None else self.group_sizes[group]
            if len(table) != expected:
                raise ValueError(f"{len(table):,} of {expected:,} rows")
            table.validate(full=True)
            return table[column].combine_chunks()


def _columns_of_all(files: Sequence[_File], key: str, label: str | None, image: str | None) -> Columns:
    """Return the columns of the first file, after a check that all other files have the same."""
    first, *others = [(file, choose_columns(file.schema, key, file.name, label, image)) for file in files]
    chosen = first[1]
    for file, columns in others:
        if columns.class_names != chosen.class_names:
            raise UserError("dataset.name", key, f"has other class names in {file.name} than in {first[0].name}")
        if columns != chosen:
            both = " but ".join(f"{f.name} has {_described(f, c)}" for f, c in (first, (file, columns)))
            raise UserError("dataset.name", key, f"{both}; all files must have the same columns")
    return chosen


def _described(file: _File, columns: Columns) -> str:
    return " and ".join(
        f"{abbreviated(name)} ({abbreviated(file.schema.field(name).type)})" for name in (columns.image, columns.label)
    )


def _numbered_classes(labels: Sequence[np.ndarray], columns: Columns, key: str) -> tuple[str, ...]:
    """Return names for class numbers without names: the numbers from 0 to the highest one."""
    highest = int(max(part.max(initial=0) for part in labels))
    if highest >= max(MAX_EMPTY_CLASSES, sum(map(len, labels))):
        fix = f"has {highest:,} in column {abbreviated(columns.label)}, more than it has images"
        raise UserError(
            "dataset.name",
            key,
            f"{fix}: this is not a class number; name the column of the labels with dataset.label=COLUMN",
        )
    return tuple(map(str, range(highest + 1)))


class _Half:
    """The files of one half of a data set.

    Args:
        files: in their order.
        columns: which are read.
        key: the data set, for messages.
    """

    def __init__(self, files: Sequence[_File], columns: Columns, key: str) -> None:
        self.columns, self.key = columns, key
        self.groups = [(file, group) for file in files for group in range(len(file.group_sizes))]
        self.starts = list(accumulate((file.group_sizes[group] for file, group in self.groups), initial=0))
        self.labels = [(file, file.read(columns.label)) for file in files]
        self._images: tuple[int, _Images] | None = None
        for file, labels in self.labels:
            if labels.null_count:
                row = pc.index(labels.is_null(), True).as_py()
                raise self._refuse(f"has {labels.null_count:,} empty labels in {file.name}, the first in row {row}")

    def _refuse(self, fix: str) -> UserError:
        return UserError("dataset.name", self.key, f"{fix} (column {abbreviated(self.columns.label)})")

    @property
    def texts(self) -> list[str]:
        """The labels as texts."""
        parts = []
        for file, labels in self.labels:
            with _reading(file.name, self.key):
                parts += labels.cast(_plain(labels.type)).to_pylist()
        return parts

    def numbers_of_texts(self, names: Sequence[str]) -> np.ndarray:
        """Return the place of each label among the names of the classes."""
        numbers = {name: number for number, name in enumerate(names)}
        texts = self.texts
        if unknown := sorted(set(texts) - numbers.keys()):
            raise self._refuse(f"has test labels that no training image has: {shortened(map(repr, unknown))}")
        if blank := [name for name in names if not name.strip() or not name.isprintable()]:
            raise self._refuse(f"has labels that are not printable text: {shortened(map(repr, blank))}")
        return np.array([numbers[text] for text in texts], np.int64)

    def numbers(self) -> np.ndarray:
        """Return the labels, ``[n] int64``."""
        parts = []
        for file, labels in self.labels:
            with _reading(file.name, self.key):
                plain = labels.cast(_plain(labels.type)) if pa.types.is_dictionary(labels.type) else labels
                numbers = plain.to_numpy(zero_copy_only=False)
            for wrong in np.flatnonzero((numbers < 0) | (numbers > np.iinfo(np.int64).max))[:1]:
                fix = f"has label {numbers[wrong]} in {file.name}, row {wrong}; labels are classes counted from 0"
                raise self._refuse(fix)
            parts.append(numbers.astype(np.int64))
        return np.concatenate(parts)

    def check_range(self, numbers: np.ndarray, num_classes: int) -> None:
        """Refuse labels without a class."""
        for row in np.flatnonzero(numbers >= num_classes)[:1]:
            fix = f"has label {numbers[row]} in {self.where(row)}, but only classes 0 to {num_classes - 1}"
            raise self._refuse(fix)

    def where(self, row: int) -> str:
        """Return the file and the row in it as text."""
        place = bisect_right(self.starts, row) - 1
        file, group = self.groups[place]
        return f"{file.path}, row {row - self.starts[place] + sum(file.group_sizes[:group])}"

    def image(self, row: int) -> bytes:
        """Return the encoded image of a row."""
        place = bisect_right(self.starts, row) - 1
        if self._images is None or self._images[0] != place:
            file, group = self.groups[place]
            self._images = place, _Images.of(file.read(self.columns.image, group))
        return self._images[1].content(row - self.starts[place])

    def source(self, numbers: np.ndarray) -> Source:
        """Return the half with these labels."""
        return Source(numbers, self.image, self.where)


def _plain(data_type: pa.DataType) -> pa.DataType:
    """Return the type of the values of a dictionary, and text for text of any kind."""
    values = data_type.value_type if pa.types.is_dictionary(data_type) else data_type
    return values if pa.types.is_integer(values) else pa.large_string()


@dataclass(frozen=True)
class _Images:
    """The images of one row group.

    Attributes:
        contents: their files.
        paths: the names of their files; None: the column has none.
    """

    contents: pa.Array
    paths: pa.Array | None

    @classmethod
    def of(cls, column: pa.Array) -> _Images:
        """Take the fields of a column apart."""
        if not pa.types.is_struct(column.type):
            return cls(column, None)
        has_path = column.type.get_field_index("path") >= 0
        return cls(pc.struct_field(column, "bytes"), pc.struct_field(column, "path") if has_path else None)

    def content(self, row: int) -> bytes:
        """Return the content of an image's file."""
        content = self.contents[row].as_py()
        if content is not None:
            return bytes(content)
        path = self.paths[row].as_py() if self.paths is not None else None
        if path is None:
            raise ImageError("has no image")
        raise ImageError(
            f"has only the path {abbreviated(path, repr)} of an image; write the image's bytes into the file"
        )

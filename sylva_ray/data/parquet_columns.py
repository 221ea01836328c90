"""Choose the columns of labels and of images in parquet files, from the schema alone.

The rule for both: the column that the user names; else the one that Hugging Face's metadata marks; else the one with a
usual name. Where a step leaves several columns, the usual names decide among them; where that leaves none or several,
the user is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sylva_ray.core.errors import UserError
from sylva_ray.core.text import abbreviated, did_you_mean, shortened

LABEL_NAMES = ("label", "labels", "class", "target", "targets", "category", "fine_label", "class_id", "class_label")
IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "pixels")


@dataclass(frozen=True)
class Columns:
    """The columns of a file that are read.

    Attributes:
        label: name of the labels.
        image: name of the images.
        label_kind: ``text`` or ``integers``.
        image_kind: ``struct`` (with a field ``bytes``) or ``binary``.
        class_names: in the order of their labels, from the metadata; empty: the metadata has none.
    """

    label: str
    image: str
    label_kind: str
    image_kind: str
    class_names: tuple[str, ...]


def choose_columns(schema: pa.Schema, key: str, file: str, label: str | None, image: str | None) -> Columns:
    """Choose the columns of a file.

    Args:
        schema: of the file.
        key: the data set, for messages.
        file: its name, for messages.
        label: the column that the user named for the labels.
        image: the column that the user named for the images.

    Raises:
        UserError: no rule decides, or the column that the user named does not exist or has another type.
    """
    features = _features(schema)
    choice = _Choice(schema, key, file)
    label_kinds = {field.name: kind for field in schema if (kind := _label_kind(field.type))}
    image_kinds = {field.name: kind for field in schema if (kind := _image_kind(field.type))}
    marked_labels = [name for name in label_kinds if features.get(name, {}).get("_type") == "ClassLabel"]
    marked_images = [name for name in image_kinds if features.get(name, {}).get("_type") == "Image"]
    structs = [name for name, kind in image_kinds.items() if kind == "struct"]
    if not marked_images and len(structs or image_kinds) == 1:
        marked_images = structs or list(image_kinds)
    image = choice.make("image", image, image_kinds, marked_images, IMAGE_NAMES)
    label = choice.make("label", label, label_kinds, marked_labels, LABEL_NAMES)
    names = features.get(label, {}).get("names", ()) if label_kinds[label] == "integers" else ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError("dataset.name", key, f"{file} has class names in its metadata that are not a list of texts")
    if len(set(names)) < len(names):
        raise UserError("dataset.name", key, f"{file} has equal class names in its metadata: {shortened(names, 12)}")
    return Columns(label, image, label_kinds[label], image_kinds[image], tuple(names))


@dataclass(frozen=True)
class _Choice:
    """The choice among the columns of one file.

    Attributes:
        schema: of the file.
        key: the data set, for messages.
        file: its name, for messages.
    """

    schema: pa.Schema
    key: str
    file: str

    def make(
        self, what: str, given: str | None, kinds: Mapping[str, str], marked: Sequence[str], usual: Sequence[str]
    ) -> str:
        """Return the name of a column.

        Args:
            what: ``label`` or ``image``.
            given: what the user named.
            kinds: the columns whose type is suitable.
            marked: those of them that the metadata or the type marks.
            usual: names that such a column usually has.
        """
        if given is not None:
            chosen = self._given(what, given, kinds)
        else:
            usually_named = [name for name in marked or kinds if name.casefold() in usual]
            candidates = marked if len(marked) == 1 else usually_named
            if len(candidates) != 1:
                raise UserError("dataset.name", self.key, self._undecided(what, kinds, candidates))
            chosen = candidates[0]
        if self.schema.names.count(chosen) > 1:
            raise UserError("dataset.name", self.key, f"{self.file} has several columns named {abbreviated(chosen)}")
        return chosen

    def _given(self, what: str, given: str, kinds: Mapping[str, str]) -> str:
        if given not in self.schema.names:
            hint = did_you_mean(given, self.schema.names)
            raise UserError(f"dataset.{what}", given, f"is not a column of {self.file}; {hint}{self._columns()}")
        if given not in kinds:
            needed = SUITABLE[what]
            raise UserError(f"dataset.{what}", given, f"must be a column of {needed}; {self.file}: {self._columns()}")
        return given

    def _undecided(self, what: str, kinds: Mapping[str, str], candidates: Sequence[str]) -> str:
        if not kinds:
            return f"{self.file} has no {what} column, which must be of {SUITABLE[what]}; {self._columns()}"
        found = (
            f"several {what} columns ({shortened(candidates, 12)})" if candidates else f"no {what} column by its name"
        )
        return f"{self.file} has {found}; name it with dataset.{what}=COLUMN; {self._columns()}"

    def _columns(self) -> str:
        return "columns: " + shortened(
            (f"{abbreviated(field.name, length=40)} ({abbreviated(field.type, length=50)})" for field in self.schema),
            12,
        )


SUITABLE = {
    "label": "integers or text",
    "image": "encoded images: binary, or a struct with a field bytes",
}
"""What a column must contain."""


def _label_kind(data_type: pa.DataType) -> str | None:
    """Return ``text`` or ``integers``; None: the type is not suitable for labels."""
    if pa.types.is_dictionary(data_type):
        return _label_kind(data_type.value_type)
    if pa.types.is_integer(data_type):
        return "integers"
    is_text = pa.types.is_string(data_type) or pa.types.is_large_string(data_type) or pa.types.is_string_view(data_type)
    return "text" if is_text else None


def _image_kind(data_type: pa.DataType) -> str | None:
    """Return ``struct`` or ``binary``; None: the type is not suitable for images."""
    if pa.types.is_struct(data_type):
        place = data_type.get_field_index("bytes")
        return "struct" if place >= 0 and _image_kind(data_type.field(place).type) == "binary" else None
    is_bytes = (
        pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type) or pa.types.is_binary_view(data_type)
    )
    return "binary" if is_bytes else None


def _features(schema: pa.Schema) -> Mapping[str, Mapping[str, Any]]:
    """Return what Hugging Face's metadata says of the columns; nothing where it cannot be read."""
    try:
        found: Any = json.loads((schema.metadata or {})[b"huggingface"])
    except (KeyError, ValueError, RecursionError):
        return {}
    for part in ("info", "features"):
        found = found.get(part) if isinstance(found, dict) else None
    features = found.items() if isinstance(found, dict) else ()
    return {name: feature for name, feature in features if isinstance(feature, dict)}

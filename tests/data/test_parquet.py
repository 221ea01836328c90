"""Columns of parquet files are found by one rule; files, labels and images that do not fit are refused by name."""

from __future__ import annotations

import io
import json
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sylva_ray.config.data import DatasetSection
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.data.datasets import Dataset, load_dataset, measure_dataset

Arrays = dict[str, pa.Array]
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


PNGS = [png(level) for level in range(64)]


def structs(rows: int, kind: pa.DataType = IMAGE) -> pa.Array:
    """Image j has the red level j."""
    return pa.array([{"bytes": PNGS[j], "path": f"{j}.png"} for j in range(rows)], kind)


def write(file: Path, columns: Arrays, features: Any = None, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, **options)


def pair(root: Path, columns: Arrays, features: Any = None) -> Path:
    """A training file and an equal test file."""
    for half in ("train", "test"):
        write(root / f"{half}.parquet", columns, features)
    return root


def load(root: Path, **section: Any) -> Dataset:
    return load_dataset(DatasetSection(name=f"parquet:{root}", **section), 8, 0)


def refused(root: Path, **section: Any) -> str:
    with pytest.raises(UserError, match=r"^dataset\.\w+ = ") as caught:
        load(root, **section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ints(*values: int | None, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(values, kind or pa.int64())


CLASS_LABEL = {"_type": "ClassLabel", "names": ["ant", "bee"]}

# -- columns -----------------------------------------------------------------------------------------------------------

FOUND: dict[str, tuple[Arrays, Any, list[int], tuple[str, ...]]] = {
    "the column named label beside other integers": (
        {"id": ints(5, 6, 7, 8), "width": ints(8, 8, 8, 8), "img": structs(4), "label": ints(0, 1, 1, 0)},
        None,
        [0, 1, 1, 0],
        ("0", "1"),
    ),
    "usual names in any case": (
        {"Index": ints(0, 1, 2, 3), "Image": structs(4), "Label": ints(1, 0, 1, 0)},
        None,
        [1, 0, 1, 0],
        ("0", "1"),
    ),
    "the class label of the metadata": (
        {"label": ints(7, 7, 7, 7), "answer": ints(0, 1, 1, 0), "img": structs(4)},
        {"answer": CLASS_LABEL, "label": {"_type": "Value", "dtype": "int64"}},
        [0, 1, 1, 0],
        ("ant", "bee"),
    ),
    "fine labels of two class labels": (
        {"coarse_label": ints(0, 0, 0, 0), "fine_label": ints(0, 1, 1, 0), "img": structs(4)},
        {"coarse_label": CLASS_LABEL, "fine_label": CLASS_LABEL},
        [0, 1, 1, 0],
        ("ant", "bee"),
    ),
    "the image of the metadata": (
        {"mask": structs(4), "scan": structs(4), "label": ints(0, 1, 1, 0)},
        {"scan": {"_type": "Image"}},
        [0, 1, 1, 0],
        ("0", "1"),
    ),
    "the image by name": (
        {"mask": structs(4), "image": structs(4), "label": ints(0, 1, 1, 0)},
        None,
        [0, 1, 1, 0],
        ("0", "1"),
    ),
    "a struct before plain bytes": (
        {"hash": pa.array([b"1", b"2", b"3", b"4"]), "scan": structs(4), "label": ints(0, 1, 1, 0)},
        None,
        [0, 1, 1, 0],
        ("0", "1"),
    ),
    "metadata that is no metadata": (
        {"image": structs(4), "label": ints(0, 1, 1, 0)},
        ["label", 3, None],
        [0, 1, 1, 0],
        ("0", "1"),
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_columns_are_found_by_rule(tmp_path: Path, case: str) -> None:
    columns, features, labels, names = FOUND[case]
    data = load(pair(tmp_path, columns, features))
    assert data.train.labels.tolist() == data.test.labels.tolist() == labels
    assert data.class_names == names
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "image_type",
    [pa.binary(), pa.large_binary(), pa.binary_view()],
    ids=str,
)
@pytest.mark.parametrize("in_struct", [False, True])
def test_images_are_read_from_every_type_of_bytes(tmp_path: Path, image_type: pa.DataType, in_struct: bool) -> None:
    contents = pa.array(PNGS[:4], pa.binary()).cast(image_type)
    column = pa.StructArray.from_arrays([contents], ["bytes"]) if in_struct else contents
    data = load(pair(tmp_path, {"image": column, "label": ints(0, 1, 0, 1)}))
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.int16(),
        pa.int32(),
        pa.int64(),
        pa.uint8(),
        pa.uint16(),
        pa.uint32(),
        pa.uint64(),
        pa.dictionary(pa.int8(), pa.int64()),
        pa.dictionary(pa.int32(), pa.uint8()),
    ],
    ids=str,
)
def test_labels_are_integers_of_any_type(tmp_path: Path, kind: pa.DataType) -> None:
    labels = (
        ints(0, 1, 2, 1).cast(kind)
        if not pa.types.is_dictionary(kind)
        else (ints(0, 1, 2, 1).cast(kind.value_type).dictionary_encode().cast(kind))
    )
    data = load(pair(tmp_path, {"image": structs(4), "label": labels}))
    assert data.train.labels.tolist() == [0, 1, 2, 1]
    assert data.train.labels.dtype == np.int64


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_texts_are_classes_in_their_order(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["dog", "cat", "Ant", "dog"])
    labels = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    data = load(pair(tmp_path, {"image": structs(4), "label": labels}))
    assert data.class_names == ("Ant", "cat", "dog")
    assert data.train.labels.tolist() == [2, 1, 0, 2]


def test_texts_of_several_files_are_numbered_together(tmp_path: Path) -> None:
    for shard, texts in enumerate((["dog", "cat"], ["ant", "dog"])):
        write(tmp_path / f"train-{shard}-of-2.parquet", {"image": structs(2), "label": pa.array(texts)})
    write(tmp_path / "test.parquet", {"image": structs(2), "label": pa.array(["ant", "dog"])})
    data = load(tmp_path)
    assert data.class_names == ("ant", "cat", "dog")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([2, 1, 0, 2], [0, 2])


def test_keys_name_the_columns(tmp_path: Path) -> None:
    columns = {
        "image": structs(4),
        "other": pa.array(PNGS[10:14]),
        "label": ints(0, 1, 1, 0),
        "my label": ints(1, 1, 0, 0),
    }
    data = load(pair(tmp_path, columns), label="my label", image="other")
    assert data.train.labels.tolist() == [1, 1, 0, 0]
    assert data.train.images[:, 0, 0, 0].tolist() == [10, 11, 12, 13]
    assert measure_dataset(DatasetSection(name=f"parquet:{tmp_path}", label="my label"), 8).num_classes == 2


def test_points_in_names_of_columns_are_part_of_the_name(tmp_path: Path) -> None:
    columns = {"a.label": ints(1, 0, 1, 0), "image": structs(4), "image.bytes": ints(9, 9, 9, 9), "a": ints(9, 9, 9, 9)}
    assert load(pair(tmp_path, columns), label="a.label").train.labels.tolist() == [1, 0, 1, 0]


UNDECIDED: dict[str, tuple[Arrays, Any, dict[str, str], list[str]]] = {
    "integers without a usual name": (
        {"a": ints(0, 1), "b": ints(0, 1), "image": structs(2)},
        None,
        {},
        ["no label column by its name", "dataset.label=COLUMN", "a (int64), b (int64), image (struct<"],
    ),
    "two usual names": (
        {"label": ints(0, 1), "target": ints(0, 1), "image": structs(2)},
        None,
        {},
        ["several label columns (label, target)", "dataset.label=COLUMN"],
    ),
    "two class labels": (
        {"a": ints(0, 1), "b": ints(0, 1), "image": structs(2)},
        {"a": CLASS_LABEL, "b": CLASS_LABEL},
        {},
        ["dataset.label=COLUMN"],
    ),
    "two images": (
        {"left": structs(2), "right": structs(2), "label": ints(0, 1)},
        None,
        {},
        ["no image column by its name", "dataset.image=COLUMN"],
    ),
    "no image": ({"label": ints(0, 1), "text": pa.array(["a", "b"])}, None, {}, ["no image column", "text (string)"]),
    "paths only": (
        {"image": structs(2, pa.struct({"path": pa.string()})), "label": ints(0, 1)},
        None,
        {},
        ["no image column", "struct<path: string>"],
    ),
    "pixels as lists": (
        {"image": pa.array([[1], [2]]), "label": ints(0, 1)},
        None,
        {},
        ["no image column", "image (list<"],
    ),
    "labels that are numbers with a point": (
        {"image": structs(2), "label": pa.array([0.0, 1.0])},
        None,
        {},
        ["no label column", "label (double)"],
    ),
    "a key that is no column": (
        {"image": structs(2), "label": ints(0, 1)},
        None,
        {"label": "lable"},
        ["dataset.label = 'lable'", "not a column of train.parquet", "did you mean 'label'"],
    ),
    "a key of another type": (
        {"image": structs(2), "label": ints(0, 1)},
        None,
        {"image": "label"},
        ["dataset.image = 'label'", "must be a column of encoded images"],
    ),
    "class names that are equal": (
        {"image": structs(2), "label": ints(0, 1)},
        {"label": {"_type": "ClassLabel", "names": ["a", "a"]}},
        {},
        ["equal class names"],
    ),
    "class names that are no texts": (
        {"image": structs(2), "label": ints(0, 1)},
        {"label": {"_type": "ClassLabel", "names": [1, {}]}},
        {},
        ["not a list of texts"],
    ),
}


@pytest.mark.parametrize("case", UNDECIDED)
def test_where_no_rule_decides_the_columns_are_listed_with_their_types(tmp_path: Path, case: str) -> None:
    columns, features, keys, expected = UNDECIDED[case]
    line = refused(pair(tmp_path, columns, features), **keys)
    for words in expected:
        assert words in line, line


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([structs(2), ints(0, 1), ints(1, 0)], ["image", "label", "label"])
    for half in ("train", "test"):
        pq.write_table(table, tmp_path / f"{half}.parquet")
    assert "several columns named label" in refused(tmp_path)


@pytest.mark.parametrize("key", ["label", "image"])
@pytest.mark.parametrize("name", ["digits", "cifar10", "imagefolder:/here"])
def test_a_column_of_another_kind_of_data_set_is_refused(name: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.{key} = 'my column': has no effect on {name}") as caught:
        build(ExperimentConfig, {"dataset": {"name": name, key: "my column"}})
    assert "\n" not in str(caught.value)


def test_only_the_needed_columns_and_row_groups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"image": structs(40), "label": ints(*[0, 1] * 20), "text": pa.array(["long"] * 40)}
    write(tmp_path / "train.parquet", columns, row_group_size=4)
    write(tmp_path / "test.parquet", columns, row_group_size=4)
    read: list[tuple[Any, ...]] = []
    for method in ("read", "read_row_group"):
        original = getattr(pq.ParquetFile, method)

        def spy(self: Any, *given: Any, original: Any = original) -> Any:
            read.append(given)
            return original(self, *given)

        monkeypatch.setattr(pq.ParquetFile, method, spy)
    measure_dataset(DatasetSection(name=f"parquet:{tmp_path}"), 8)
    assert read == [(["label"],), (["label"],), (0, ["image"])]
    read.clear()
    data = load(tmp_path)
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(40))
    assert read.count((3, ["image"])) == 2


# -- labels ------------------------------------------------------------------------------------------------------------

LABELS: dict[str, tuple[pa.Array, Any, list[str]]] = {
    "empty labels": (ints(0, None, 1, None), None, ["2 empty labels in train.parquet, the first in row 1"]),
    "negative labels": (ints(0, 1, -1, 1), None, ["label -1 in train.parquet, row 2", "counted from 0"]),
    "labels beyond the names": (ints(0, 1, 2, 1), {"label": CLASS_LABEL}, ["label 2 in", "row 2", "classes 0 to 1"]),
    "labels that are no classes": (ints(3, 10**15, 7, 1), None, ["1,000,000,000,000,000", "not a class number"]),
    "the highest unsigned number": (ints(0, 2**64 - 1, 1, 1, kind=pa.uint64()), None, ["18446744073709551615"]),
    "empty texts": (pa.array(["a", None, "b", "a"]), None, ["1 empty labels", "row 1"]),
    "blank texts": (pa.array(["a", "", "b", "a"]), None, ["''", "not printable text"]),
    "one class": (ints(0, 0, 0, 0), None, ["1 class"]),
    "no rows": (ints(), None, ["no training images"]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, case: str) -> None:
    labels, features, expected = LABELS[case]
    line = refused(pair(tmp_path, {"image": structs(len(labels)), "label": labels}, features))
    for words in expected:
        assert words in line, line


def test_a_test_text_that_is_never_trained_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", {"image": structs(2), "label": pa.array(["ant", "bee"])})
    write(tmp_path / "test.parquet", {"image": structs(2), "label": pa.array(["ant", "cow"])})
    assert "test labels that no training image has: 'cow'" in refused(tmp_path)


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ((1, 2, 4, 4), "2 of 5 classes have no training images: 0, 3"),
        ((1, 2, 3, 1), "1 of 4 classes have no"),
        ((0, 1, 2, 1), None),
    ],
)
def test_class_numbers_with_gaps_or_from_one_are_said(tmp_path: Path, labels: Sequence[int], shown: str | None) -> None:
    data = load(pair(tmp_path, {"image": structs(4), "label": ints(*labels)}))
    assert data.num_classes == max(labels) + 1
    assert data.train.labels.tolist() == list(labels)
    if shown is None:
        assert not data.notices
    else:
        assert shown in data.notices[0]


def test_names_without_images_are_said(tmp_path: Path) -> None:
    names = {"_type": "ClassLabel", "names": ["ant", "bee", "cow"]}
    data = load(pair(tmp_path, {"image": structs(2), "label": ints(0, 1)}, {"label": names}))
    assert "1 of 3 classes have no training images: 2 (cow)" in data.notices[0]


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ({"bytes": None, "path": "cats/1.png"}, "has only the path 'cats/1.png' of an image"),
        ({"bytes": None, "path": None}, "has no image"),
        (None, "has no image"),
        ({"bytes": b"junk", "path": None}, "is not a readable image"),
    ],
)
def test_an_image_that_is_not_there_is_located(tmp_path: Path, cell: Any, expected: str) -> None:
    column = pa.array([{"bytes": PNGS[0]}, {"bytes": PNGS[1]}, {"bytes": PNGS[2]}, cell], IMAGE)
    write(tmp_path / "train.parquet", {"image": column, "label": ints(0, 1, 0, 1)}, row_group_size=2)
    write(tmp_path / "test.parquet", {"image": structs(2), "label": ints(0, 1)})
    line = refused(tmp_path)
    assert f"{tmp_path}/train.parquet, row 3" in line
    assert expected in line


def test_images_in_parquet_are_converted_as_files_are(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 257 * 99, np.uint16)).save(buffer, "PNG")
    pair(tmp_path, {"image": pa.array([buffer.getvalue()] * 2), "label": ints(0, 1)})
    assert (load(tmp_path).train.images == 99).all()


@pytest.mark.parametrize("sizes", [(8, 8, 8, 12), (12, 8, 8, 8), (8, 8, 12, 8)])
def test_photographs_of_several_sizes_are_all_resized(tmp_path: Path, sizes: Sequence[int]) -> None:
    """As soon as one has another size, all are resized; the result does not depend on when that is."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for side in sizes]
    contents = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        contents.append(buffer.getvalue())
    pair(tmp_path, {"image": pa.array(contents), "label": ints(0, 1, 0, 1)})
    data = load_dataset(DatasetSection(name=f"parquet:{tmp_path}"), 10, 0)
    expected = np.stack([np.asarray(image.resize((10, 10), Image.Resampling.BILINEAR)) for image in images])
    assert np.array_equal(data.train.images, expected.transpose(0, 3, 1, 2))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train-00000-of-00001-a09b74b3ef9c3b56.parquet", "validation-00000-of-00001-b42abd576e0197a0.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("train/part-b.parquet", "test/part-a.parquet"),
        ("data/train/0000.parquet", "data/val/0000.parquet"),
        ("Training.parquet", "Testing.parquet"),
        ("cifar10-train.parquet", "cifar10-test.parquet"),
        ("train_0.parquet", "dev.parquet"),
    ],
)
def test_usual_layouts_are_found(tmp_path: Path, names: tuple[str, str]) -> None:
    columns = {"image": structs(4), "label": ints(0, 1, 1, 0)}
    for name in names:
        write(tmp_path / name, columns)
    (tmp_path / "README.md").write_text("A data set.")
    (tmp_path / ".cache").mkdir()
    data = load(tmp_path)
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 1, 1, 0]
    assert not data.notices


UNCLEAR: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["no training images", "train.parquet, train-*.parquet or train/*.parquet"]),
    "no split": (["a.parquet"], ["no training images", "found a.parquet"]),
    "one folder deep": (["plain_text/train.parquet", "plain_text/test.parquet"], ["try parquet:", "/plain_text"]),
    "no test half": (["train.parquet"], ["train*.parquet but no test images"]),
    "a half in two places": (["train.parquet", "data/train.parquet", "test.parquet"], ["train split twice"]),
    "a half in a file and a folder": (["train.parquet", "train/0.parquet", "test.parquet"], ["train split twice"]),
    "a missing file": (
        ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet", "test.parquet"],
        ["2 of 3 files of one split"],
    ),
    "two exports": (
        [
            "train-00000-of-00001.parquet",
            "train-00000-of-00002.parquet",
            "train-00001-of-00002.parquet",
            "test.parquet",
        ],
        ["do not belong together"],
    ),
    "one file and its parts": (
        ["train.parquet", "train-00000-of-00001.parquet", "test.parquet"],
        ["do not belong together"],
    ),
    "two sizes": (["train-small.parquet", "train-full.parquet", "test.parquet"], ["without numbers", "keep one"]),
    "two splits in one name": (["train-test.parquet", "test.parquet"], ["two splits: train-test.parquet"]),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_files_that_are_not_clear_are_refused_by_name(tmp_path: Path, case: str) -> None:
    names, expected = UNCLEAR[case]
    for name in names:
        write(tmp_path / name, {"image": structs(2), "label": ints(0, 1)})
    line = refused(tmp_path)
    for words in expected:
        assert words in line, line


def test_parquet_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("train.parquet", "test.parquet", "valid.parquet", "extra.parquet", "more/unlabelled.parquet"):
        write(tmp_path / name, {"image": structs(2), "label": ints(0, 1)})
    first, second = load(tmp_path).notices
    assert first.endswith("the test half is test*.parquet; valid*.parquet is not read")
    assert second.endswith("2 parquet files are not read: extra.parquet, more/unlabelled.parquet")


DIFFERENT: dict[str, tuple[Arrays, list[str]]] = {
    "another type": (
        {"image": structs(2), "label": pa.array(["a", "b"])},
        ["label (int64)", "label (string)", "must have the same columns"],
    ),
    "another image type": ({"image": pa.array(PNGS[:2]), "label": ints(0, 1)}, ["image (binary)", "image (struct"]),
    "another column": ({"image": structs(2), "target": ints(0, 1)}, ["target (int64)", "label (int64)"]),
    "no label": ({"image": structs(2)}, ["has no label column"]),
}


@pytest.mark.parametrize("other", ["train-1.parquet", "test.parquet"])
@pytest.mark.parametrize("case", DIFFERENT)
def test_files_of_different_schemas_are_refused_with_their_types(tmp_path: Path, case: str, other: str) -> None:
    for name in ("train-0.parquet", "train-1.parquet", "test.parquet"):
        columns = DIFFERENT[case][0] if name == other else {"image": structs(2), "label": ints(0, 1)}
        write(tmp_path / name, columns)
    line = refused(tmp_path)
    for words in [*DIFFERENT[case][1], other]:
        assert words in line, line


def test_other_widths_and_further_columns_are_no_difference(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", {"image": structs(2), "label": ints(0, 1, kind=pa.int8())})
    write(tmp_path / "train-1.parquet", {"label": ints(1, 0), "more": pa.array(["x", "y"]), "image": structs(2)})
    write(tmp_path / "test.parquet", {"image": structs(2), "label": ints(1, 0, kind=pa.uint16())})
    assert load(tmp_path).train.labels.tolist() == [0, 1, 1, 0]


def damaged(data: bytes) -> dict[str, bytes]:
    huge = data[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1"
    return {
        "empty": b"",
        "text": b"label,image\n" * 20,
        "cut": data[: len(data) // 2],
        "end cut": data[:-1],
        "footer of two gigabytes": huge,
        "pages overwritten": data[:4] + bytes(len(data) // 3) + data[4 + len(data) // 3 :],
    }


@pytest.mark.parametrize("damage", damaged(b"PAR1" * 10))
@pytest.mark.parametrize("half", ["train", "test"])
def test_damaged_files_are_named_at_once(tmp_path: Path, damage: str, half: str) -> None:
    pair(tmp_path, {"image": structs(30), "label": ints(*[0, 1] * 15)})
    file = tmp_path / f"{half}.parquet"
    file.write_bytes(damaged(file.read_bytes())[damage])
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = refused(tmp_path)
    assert f"{half}.parquet is not readable parquet" in line
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "test.parquet", {"image": structs(2), "label": ints(0, 1)})
    train = tmp_path / "train.parquet"
    if kind == "link":
        os.symlink(tmp_path / "nowhere", train)
    elif kind == "pipe":
        os.mkfifo(train)
    else:
        train.mkdir()
    assert "train" in refused(tmp_path)


def test_the_test_half_is_no_link_to_the_training_half(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", {"image": structs(2), "label": ints(0, 1)})
    os.symlink("train.parquet", tmp_path / "test.parquet")
    assert "the same file twice, as train.parquet and test.parquet" in refused(tmp_path)


def test_a_file_in_place_of_a_folder_names_its_folder(tmp_path: Path) -> None:
    pair(tmp_path, {"image": structs(2), "label": ints(0, 1)})
    assert f"name the folder that contains it, {tmp_path}" in refused(tmp_path / "train.parquet")

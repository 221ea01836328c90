"""Damaged and odd data sets: parquet files, images and folders become a data set or one line."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sylva_ray.config.data import DatasetSection
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.data.datasets import Dataset, load_dataset
from tests.fuzz.outcome import outcome


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for one example; hypothesis calls a test many times with the same `tmp_path`."""
    root = Path(tempfile.mkdtemp())
    try:
        yield root
    finally:
        shutil.rmtree(root)


def check(name: str, root: Path, **section: Any) -> None:
    """Load a data set, which must be whole or refused."""
    given = {"name": name, **section}
    result = outcome(lambda: load_dataset(build(DatasetSection, given, "dataset"), 16, 0), untouched=root)
    if isinstance(result, UserError):
        return
    assert isinstance(result, Dataset)
    for split in (result.train, result.test):
        assert split.images.shape == (len(split), 3, result.image_size, result.image_size)
        assert split.images.dtype == np.uint8
        assert 0 <= split.labels.min() <= split.labels.max() < result.num_classes
    assert all(notice.isprintable() for notice in result.notices)


@cache
def picture(mode: str, file_format: str) -> bytes:
    """A small image of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).convert("L" if mode.startswith("I") else mode).convert(mode)
    image.save(buffer, file_format)
    return buffer.getvalue()


PICTURES = [
    *[(mode, "PNG") for mode in ("RGB", "P", "RGBA", "I;16")],
    *[(mode, "TIFF") for mode in ("RGB", "P", "I;16", "CMYK")],
    *[("RGB", name) for name in ("JPEG", "BMP", "WEBP", "JPEG2000", "TGA", "ICO", "AVIF", "QOI")],
    *[("P", "GIF"), ("L", "PPM"), ("CMYK", "JPEG")],
]


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes replaced, mostly in the header or at the end; perhaps a part removed, repeated or cut off."""
    content = bytearray(data)
    places = st.one_of(
        st.integers(0, min(63, len(data) - 1)),
        st.integers(0, len(data) - 1),
        st.integers(max(0, len(data) - 300), len(data) - 1),
    )
    for _ in range(draw(st.integers(0, 8))):
        content[draw(places)] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    start, length = draw(places), draw(st.integers(0, 40))
    match draw(st.sampled_from(["keep", "keep", "remove", "repeat", "cut"])):
        case "remove":
            del content[start : start + length]
        case "repeat":
            content[start:start] = content[start : start + length]
        case "cut":
            del content[start:]
    return bytes(content)


@given(st.data())
def test_images(data: st.DataObject) -> None:
    with folder() as root:
        for name in ("a", "b"):
            (root / name).mkdir()
            for j in range(3):
                (root / name / f"{j}.png").write_bytes(picture("RGB", "PNG"))
        for j in range(4):
            content = data.draw(mutated(picture(*data.draw(st.sampled_from(PICTURES)))))
            (root / "a" / f"{4 + j}.png").write_bytes(content)
        check(f"imagefolder:{root}", root)


@cache
def parquet(kind: str) -> bytes:
    """A valid file with six images of two classes."""
    images: pa.Array = pa.array([picture("RGB", "PNG")] * 6)
    labels: pa.Array = pa.array([0, 1, 0, 1, 1, 0])
    if kind == "struct":
        images = pa.StructArray.from_arrays([images, pa.array(["x.png"] * 6)], ["bytes", "path"])
    if kind == "text":
        labels = pa.array(["ant", "bee"] * 3).dictionary_encode()
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ant", "bee"]}}
    table = pa.table({"image": images, "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd" if kind == "zstd" else "snappy", row_group_size=4)
    return buffer.getvalue()


@given(st.data())
def test_bytes_of_parquet_files(data: st.DataObject) -> None:
    with folder() as root:
        for half in ("train", "test"):
            content = parquet(data.draw(st.sampled_from(["plain", "struct", "text", "zstd"])))
            (root / f"{half}.parquet").write_bytes(data.draw(mutated(content)))
        check(f"parquet:{root}", root)


STRUCTS = [
    pa.struct({"path": pa.string()}),
    pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    pa.struct({"bytes": pa.string()}),
    pa.struct({"bytes": pa.list_(pa.uint8())}),
]
NUMBERS = [pa.int8(), pa.uint64(), pa.int64(), pa.float64(), pa.bool_(), pa.date32(), pa.decimal128(5), pa.null()]
TEXTS = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
TYPES = [*NUMBERS, *TEXTS, *STRUCTS, pa.list_(pa.int32()), pa.list_(pa.uint8(), 2)]

NAMES = st.sampled_from(
    ["label", "Label", "labels", "image", "img", "a.b", "", "\n", "x" * 5000, "名前", "id"]
) | st.text(max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["ClassLabel", "Image", "ant", "bee", "\x00"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["info", "features", "label", "image", "_type", "names", "id"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@st.composite
def columns(draw: st.DrawFn, rows: int) -> pa.Array:
    """A column of any type, with plausible, odd or missing values."""
    data_type = draw(st.sampled_from(TYPES))
    if pa.types.is_integer(data_type):
        values: Any = st.integers(0, 3) | st.sampled_from([-1, 127, 2**63 - 1, None])
    elif "bytes: binary" in str(data_type):
        values = st.sampled_from(
            [{"bytes": picture("RGB", "PNG")}, {"bytes": None, "path": "x.png"}, {"bytes": b""}, None]
        )
    elif pa.types.is_binary(data_type):
        values = st.sampled_from([picture("RGB", "PNG"), picture("L", "PPM"), b"\x00", None])
    elif "string" in str(data_type) and not pa.types.is_struct(data_type):
        values = st.sampled_from(["ant", "bee", "", "\n", "x" * 3000, None])
    else:
        values = st.none()
    drawn = draw(st.lists(values, min_size=rows, max_size=rows))
    try:
        return (
            pa.array(drawn, data_type.value_type).dictionary_encode()
            if pa.types.is_dictionary(data_type)
            else pa.array(drawn, data_type)
        )
    except (pa.ArrowException, OverflowError):  # such as -1 as an unsigned integer
        return pa.array([0] * rows, data_type)


@given(st.data())
def test_schemas_of_parquet_files(data: st.DataObject) -> None:
    with folder() as root:
        rows = data.draw(st.integers(0, 5))
        for file in data.draw(st.sampled_from([("train", "test"), ("train-0-of-2", "train-1-of-2", "test")])):
            names = data.draw(st.just(["image", "label"]) | st.lists(NAMES, max_size=4))
            table = pa.Table.from_arrays([data.draw(columns(rows)) for _ in names], names)
            metadata = data.draw(st.none() | JSON.map(json.dumps) | st.just("[" * 50_000) | st.just("\udcff"))
            if metadata is not None:
                encoded = metadata.encode(errors="surrogatepass")
                table = table.replace_schema_metadata({"huggingface": encoded})
            pq.write_table(table, root / f"{file}.parquet")
        keys = {key: value for key in ("label", "image") if (value := data.draw(st.none() | NAMES)) is not None}
        check(f"parquet:{root}", root, **keys)


ENTRY = st.sampled_from(["image", "image", "text", "pipe", "up", "broken", "root", "sibling"])
PLAIN_NAMES = ["cat", "dog", "train", "Train", "testing", "val", "data", "1", "10", "a.png", "b.TIFF", "c.heic"]
ENTRY_NAMES = st.sampled_from([*PLAIN_NAMES, ".x", "__MACOSX", "d\ne", "e\udcff", "f" * 250])
TREES = st.recursive(ENTRY, lambda inner: st.dictionaries(ENTRY_NAMES, inner, max_size=5), max_leaves=25)
IMAGES = {f"{j}.png": "image" for j in range(5)}
CLASSES = st.fixed_dictionaries({"cat": st.just(IMAGES) | TREES, "dog": st.just(IMAGES) | TREES})
FOLDERS = st.one_of(
    st.dictionaries(ENTRY_NAMES, TREES, max_size=6),
    CLASSES,
    st.fixed_dictionaries({"train": CLASSES, "test": CLASSES}, optional={"extra": TREES, "val": CLASSES}),
)


def grow(root: Path, here: Path, tree: Any) -> None:
    """Make the files and folders of a tree."""
    if isinstance(tree, dict):
        here.mkdir(exist_ok=True)
        for name, inner in tree.items():
            grow(root, here / name, inner)
    elif tree == "image":
        here.write_bytes(picture("RGB", "PNG"))
    elif tree == "text":
        here.write_text("text")
    elif tree == "pipe":
        os.mkfifo(here)
    else:
        targets = {"up": here.parent, "broken": root / "nowhere", "root": root, "sibling": here.parent / "cat"}
        os.symlink(targets[tree], here)


@given(FOLDERS)
def test_folders(tree: Any) -> None:
    with folder() as root:
        grow(root, root, tree)
        check(f"imagefolder:{root}", root)
        check(f"parquet:{root}", root)

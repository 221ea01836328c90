"""Folders become the classes and halves that they mean, or are refused; nothing is left out in silence."""

from __future__ import annotations

import io
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sylva_ray.config.data import DatasetSection
from sylva_ray.core.errors import UserError
from sylva_ray.data.datasets import Dataset, find_dataset, load_dataset

Tree = dict[str, Any]
"""Names of folders and files; an integer stands for that many images, None for an empty folder, a text for a file."""


def grow(root: Path, tree: Tree) -> Path:
    """Make folders and files; each image has its own colour."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in tree.items():
        if isinstance(content, dict):
            grow(root / name, content)
        elif isinstance(content, int):
            (root / name).mkdir()
            for j in range(content):
                shade = sum(map(ord, str(root / name)[-40:])) % 200 + j
                Image.new("RGB", (8, 8), (shade, j, 0)).save(root / name / f"{j}.png")
        elif content is None:
            (root / name).mkdir()
        elif content == "image":
            (root / name).write_bytes(PNG)
        else:
            (root / name).write_text(content)
    return root


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def load(root: Path) -> Dataset:
    return load_dataset(DatasetSection(name=f"imagefolder:{root}"), 8, 0)


def refused(root: Path) -> str:
    with pytest.raises(UserError, match=r"^dataset\.name = ") as caught:
        load(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CLASSES: Tree = {"cat": 5, "dog": 5}
FEW: Tree = {"cat": 2, "dog": 2}


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "Training", "training_set", "train-images"])
@pytest.mark.parametrize(
    "test", ["test", "Testing", "test_set", "val", "Valid", "validation", "eval", "Evaluation", "dev"]
)
def test_usual_spellings_of_splits_are_halves_and_not_classes(tmp_path: Path, train: str, test: str) -> None:
    data = load(grow(tmp_path, {train: CLASSES, test: FEW}))
    assert data.class_names == ("cat", "dog")
    assert np.bincount(data.train.labels).tolist() == [5, 5]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert not data.notices


def test_the_test_half_is_test_before_validation_before_eval_before_dev(tmp_path: Path) -> None:
    tree: Tree = {"train": CLASSES}
    for count, name in enumerate(["dev", "eval", "val", "test"], 1):
        tree[name] = {"cat": count, "dog": count}
        data = load(grow(tmp_path / name, tree))
        assert len(data.test) == 2 * count
        assert len(data.notices) == (count > 1)
    assert data.notices[0].endswith("the test half is test/; val/, eval/, dev/ is not read")


MALFORMED: dict[str, tuple[Tree, list[str]]] = {
    "training alone": ({"Train": CLASSES}, ["Train/", "no test images", "PATH/test/CLASS"]),
    "test alone": ({"test": CLASSES, "val": CLASSES}, ["test/, val/", "no training images"]),
    "two spellings of training": ({"train": CLASSES, "Train": CLASSES, "test": FEW}, ["train split twice", "Train/"]),
    "two spellings of test": ({"train": CLASSES, "test": FEW, "testing": FEW}, ["test split twice", "testing/"]),
    "splits beside classes": ({"train": CLASSES, "test": FEW, "bird": 3}, ["images in bird/", "is a split"]),
    "a split's name as a class": ({"cat": 5, "dog": 5, "test": 5}, ["cat/", "beside test/"]),
    "training as class in training": ({"train": {"train": CLASSES}, "test": FEW}, ["train/train/", "split"]),
    "classes with splits in them": ({"cat": {"train": 3, "test": 2}, "dog": 3}, ["train/", "class folder cat/"]),
    "splits as words of names": ({"seg_train": 9, "seg_test": 9}, ["seg_test/", "seg_train/", "names of splits"]),
    "splits with numbers": ({"train_1": 9, "test_1": 9}, ["test_1/", "names of splits"]),
    "splits two folders deep": ({"a": {"b": {"train": CLASSES}}, "c": 1}, ["train/", "class folder a/"]),
    "splits one folder deep": (
        {"data": {"train": CLASSES, "test": FEW}},
        ["test/, train/", "use imagefolder:", "/data"],
    ),
    "an empty class": ({"cat": 5, "dog": 5, "owl": None}, ["owl/", "it is empty", "fill or remove"]),
    "an empty class in training": ({"train": {"cat": 5, "owl": None}, "test": FEW}, ["train/owl/", "empty"]),
    "a class of other files": ({"cat": 5, "owl": {"a.heic": "x", "b.heic": "x"}}, ["owl/", "a.heic, b.heic"]),
    "a class in hidden files": ({"cat": 5, "owl": {".a.png": "image"}}, ["owl/", "empty"]),
    "a class that is only in test": ({"train": CLASSES, "test": FEW | {"owl": 1}}, ["'owl' in test/", "not in"]),
    "a class in other letters": ({"train": CLASSES, "test": {"Cat": 2, "dog": 2}}, ["'Cat'", "did you mean 'cat'"]),
    "images without classes": ({"a.png": "image", "b.png": "image"}, ["no folders of classes", "2 images"]),
    "training images without classes": ({"train": {"a.png": "image"}, "test": FEW}, ["in train/", "1 images"]),
    "test images without classes": ({"train": CLASSES, "test": {"1.png": "image"}}, ["test/", "it holds 1.png"]),
    "empty test classes": ({"train": CLASSES, "test": {"cat": None, "dog": None}}, ["no images", "test/"]),
    "empty halves": ({"train": None, "test": None}, ["no folders of classes in train/"]),
    "one class": ({"cat": 5}, ["1 class"]),
    "a name that cannot be printed": ({"cat": 3, "do\ng": 3}, ["'do\\ng'", "printable"]),
    "nothing": ({}, ["no folders of classes"]),
    "too few images to split": ({"cat": 1, "dog": 2}, ["no test images", "at least 3 images"]),
    "another spelling": (
        {"train": {"caf\u00e9": 5, "dog": 5}, "test": {"cafe\u0301": 3, "dog": 3}},
        ["another Unicode spelling"],
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_folders_that_are_not_clear_are_refused_by_name(tmp_path: Path, case: str) -> None:
    tree, expected = MALFORMED[case]
    line = refused(grow(tmp_path, tree))
    for words in expected:
        assert words in line, line


def test_hidden_files_and_folders_never_count_at_any_depth(tmp_path: Path) -> None:
    plain = load(grow(tmp_path / "plain", {"train": CLASSES, "test": FEW}))
    grow(tmp_path / "other", {"train": CLASSES, "test": FEW})
    junk: Tree = {".DS_Store": "x", "._0.png": "image", "Thumbs.db": "x"}
    junk |= {name: {"0.png": "image"} for name in (".ipynb_checkpoints", "__MACOSX", ".git")}
    for folder in [tmp_path / "other", *sorted((tmp_path / "other").rglob("*/"))]:
        grow(folder, junk)
    other = load(tmp_path / "other")
    assert not other.notices
    assert (len(other.train), len(other.test)) == (len(plain.train), len(plain.test))


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    extra: Tree = {"README.md": "text", "sample.png": "image"}
    tree = extra | {"train": {"cat": {"0.png": "image", "a.heic": "x"}, "dog": 2, "b.png": "image"}, "test": FEW}
    (notice,) = load(grow(tmp_path, tree | {"labels": {"names.txt": "text"}})).notices
    assert notice == f"imagefolder:{tmp_path}: 5 files are not read: README.md, labels/names.txt, sample.png and 2 more"


def test_a_broken_link_and_a_pipe_are_named_and_do_not_hang(tmp_path: Path) -> None:
    grow(tmp_path, CLASSES)
    for link in ("cat/link.png", "top.png"):
        os.symlink(tmp_path / "nowhere", tmp_path / link)
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    (notice,) = load(tmp_path).notices
    assert notice == f"imagefolder:{tmp_path}: 3 files are not read: cat/link.png, dog/pipe.png, top.png"


def test_a_class_without_test_images_is_named(tmp_path: Path) -> None:
    data = load(grow(tmp_path, {"train": CLASSES | {"owl": 2}, "test": FEW | {"owl": None}}))
    assert data.class_names == ("cat", "dog", "owl")
    assert data.notices == (f"imagefolder:{tmp_path}: 1 of 3 classes have no test images: 2 (owl)",)
    assert load(grow(tmp_path / "x", {"train": CLASSES | {"owl": 2}, "test": FEW})).num_classes == 3


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["1", "2", "4"], "labels 0 to 2 are the class folders in the order of text: 1, 2, 4"),
        (["1", "2", "10"], "labels 0 to 2 are the class folders in the order of text: 1, 10, 2"),
        (["0", "1", "2"], None),
        (["00", "01", "02"], None),
        (["0", "1", "x"], None),
    ],
)
def test_numbered_classes_with_gaps_or_another_order_are_said(
    tmp_path: Path, names: list[str], shown: str | None
) -> None:
    data = load(grow(tmp_path, dict.fromkeys(names, 5)))
    assert data.class_names == tuple(sorted(names))
    assert data.notices == (() if shown is None else (f"imagefolder:{tmp_path}: {shown}",))


def test_classes_that_differ_in_case_only_are_said(tmp_path: Path) -> None:
    data = load(grow(tmp_path, {"cat": 5, "Cat": 5, "dog": 5}))
    assert data.class_names == ("Cat", "cat", "dog")
    assert data.notices == (f"imagefolder:{tmp_path}: classes that differ in case or blanks only: 'Cat', 'cat'",)


def test_every_suffix_that_can_be_decoded_counts(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for suffix in ("png", "PNG", "tif", "TIFF", "jp2", "jfif", "tga", "qoi", "avif", "webp", "pgm", "ico"):
            Image.new("RGB", (16, 16), (50, 50, 50)).save(tmp_path / name / f"x{suffix}.{suffix}")
    data = load(tmp_path)
    assert len(data.train) + len(data.test) == 24
    assert not data.notices
    assert np.abs(data.train.images.astype(int) - 50).max() <= 3


def test_folders_below_a_class_belong_to_it_also_through_links(tmp_path: Path) -> None:
    grow(tmp_path / "real", {"more": 5})
    root = grow(tmp_path / "data", {"cat": {"deep": {"deeper": 5}}, "dog": 5})
    os.symlink(tmp_path / "real" / "more", root / "cat" / "linked")
    data = load(root)
    assert sorted(np.bincount(np.concatenate([data.train.labels, data.test.labels])).tolist()) == [5, 10]


@pytest.mark.parametrize(
    ("link", "target"),
    [("cat/up", "."), ("loop", "."), ("cat/deep/self", "cat/deep"), ("tomcat", "cat"), ("cat/more", "dog")],
)
def test_a_folder_is_never_read_twice_through_a_link(tmp_path: Path, link: str, target: str) -> None:
    """Loops would not end, and one image would be in two classes."""
    grow(tmp_path, {"cat": {"0.png": "image", "deep": 1}, "dog": 3})
    os.symlink(tmp_path / target, tmp_path / link)
    line = refused(tmp_path)
    assert "the same folder twice" in line
    assert f"{link}/" in line


@pytest.mark.parametrize(("test", "link", "target"), [(None, "test", "train"), ({"dog": 2}, "test/cat", "train/cat")])
def test_the_test_half_is_no_link_to_the_training_half(
    tmp_path: Path, test: Tree | None, link: str, target: str
) -> None:
    grow(tmp_path, {"train": CLASSES} | ({"test": test} if test else {}))
    os.symlink(tmp_path / target, tmp_path / link)
    assert f"the same folder twice, as {target}/ and {link}/" in refused(tmp_path)


def test_links_that_multiply_are_refused_at_once(tmp_path: Path) -> None:
    grow(tmp_path, CLASSES)
    for depth in range(30):
        (tmp_path / "cat" / f"{depth}").mkdir()
        for name in ("a", "b"):
            os.symlink(tmp_path / "cat" / f"{depth + 1}", tmp_path / "cat" / f"{depth}" / name)
    assert "the same folder twice" in refused(tmp_path)


def test_very_deep_folders_are_searched(tmp_path: Path) -> None:
    """Deeper than Python's stack, which pytest could not remove afterwards."""
    grow(tmp_path, CLASSES)
    deepest = "/".join("d" * 1200)
    subprocess.run(["mkdir", "-p", deepest], check=True, cwd=tmp_path / "cat")
    try:
        assert len(load(tmp_path).train) == 8
    finally:
        subprocess.run(["rm", "-rf", "d"], check=True, cwd=tmp_path / "cat")


def test_a_file_in_place_of_a_folder_names_its_folder(tmp_path: Path) -> None:
    grow(tmp_path, {"a.png": "image"})
    assert f"is a file; name the folder that contains it, {tmp_path}" in refused(tmp_path / "a.png")


def test_a_line_of_pixels_does_not_fill_the_memory(tmp_path: Path) -> None:
    grow(tmp_path, CLASSES)
    Image.new("RGB", (60_000, 1)).save(tmp_path / "cat" / "0.png")
    Image.new("RGB", (60_000, 1)).save(tmp_path / "cat" / "1.png")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cat/\d\.png'?: is too narrow .* 60000 x 1"):
        load_dataset(DatasetSection(name=f"imagefolder:{tmp_path}"), 64, 0)
    assert time.monotonic() - started < 2


def test_an_image_that_cannot_be_converted_is_named_with_its_mode(tmp_path: Path) -> None:
    grow(tmp_path, CLASSES)
    Image.new("F", (8, 8)).save(tmp_path / "cat" / "x.tiff")
    line = refused(tmp_path)
    assert line.startswith(f"dataset.name = '{tmp_path}/cat/x.tiff': has mode F ")


def test_images_and_labels_of_a_folder_per_class_are_mixed_together(tmp_path: Path) -> None:
    """Each image has its own colour, so an image that had lost its label would be found."""
    classes = dict.fromkeys(("ant", "bee", "cat", "dog"), 30)
    data = load(grow(tmp_path / "tree", {"train": classes, "test": classes}))
    for half, split in (("train", data.train), ("test", data.test)):
        assert set(split.labels[:20].tolist()) == {0, 1, 2, 3}
        assert np.bincount(split.labels).tolist() == [30] * 4
        for image, label in zip(split.images, split.labels, strict=True):
            folder = tmp_path / "tree" / half / data.class_names[label]
            number = int(image[1, 0, 0])
            assert np.array_equal(image, np.asarray(Image.open(folder / f"{number}.png")).transpose(2, 0, 1))
    found = find_dataset(DatasetSection(name=f"imagefolder:{tmp_path / 'tree'}"))
    assert np.array_equal(found.labels(0).train, data.train.labels)

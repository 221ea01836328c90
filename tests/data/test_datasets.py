"""Every kind of data set becomes uint8 squares with the right labels; every broken one becomes one clear line."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sylva_ray.config.data import DatasetSection
from sylva_ray.core.errors import UserError
from sylva_ray.data.datasets import Dataset, _decoded, _subset, load_dataset
from sylva_ray.data.own import _pairs

SHARED = Path(__file__).parents[2] / "../shared/data"
CIFAR10 = SHARED / "cifar10"
TINY_IMAGENET = SHARED / "tiny-imagenet-32"
needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 parquet is not beside the checkout")
needs_tiny = pytest.mark.skipif(not TINY_IMAGENET.is_dir(), reason="Tiny-ImageNet parquet is not beside the checkout")

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


def load(name: str, image_size: int = 32, seed: int = 0, **section: Any) -> Dataset:
    return load_dataset(DatasetSection(name=name, **section), image_size, seed)


def refused(name: str, **section: Any) -> str:
    """The one line that a user sees."""
    with pytest.raises(UserError, match=r"^dataset\.name = ") as caught:
        load(name, **section)
    return str(caught.value)


def png(colour: tuple[int, int, int], size: tuple[int, int] = (12, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def noise(file_format: str) -> bytes:
    """An image that does not compress, so that half of the file is about half of the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def truncated() -> list[bytes]:
    return [data[: len(data) // 2] for data in (noise("PNG"), noise("JPEG"))]


def broken_chunk() -> bytes:
    """A PNG whose first pixel chunk has a wrong name (Pillow raises SyntaxError for some of these)."""
    return noise("PNG").replace(b"IDAT", b"\x00\xff\x00\x00")


def write_folder(root: Path, per_class: int, size: tuple[int, int] = (40, 24)) -> None:
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for j in range(per_class):
            (root / name / f"{j}.png").write_bytes(png(colour, size))


def write_parquet(file: Path, labels: list[int | None], images: list[bytes] | None = None, **names: list[str]) -> None:
    """Hugging Face's image schema; class names are those of `COLOURS` unless given."""
    features = {
        "picture": {"_type": "Image"},
        "answer": {"_type": "ClassLabel", "names": names.get("names", list(COLOURS))},
    }
    images = images or [png(list(COLOURS.values())[label or 0]) for label in labels]
    cells = pa.array(
        [{"bytes": b, "path": None} for b in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({"serial": pa.array(range(len(labels))), "picture": cells, "answer": pa.array(labels, pa.int64())})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), file)


def assert_well_formed(data: Dataset, size: int) -> None:
    for split in (data.train, data.test):
        assert split.images.shape == (len(split), 3, size, size)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert 0 <= split.labels.min() <= split.labels.max() < data.num_classes
    assert data.image_size == size


def test_digits_are_split_four_to_one_by_class_and_use_the_whole_range() -> None:
    data = load("digits")
    assert_well_formed(data, 32)
    assert len(data.train) + len(data.test) == 1797
    assert data.class_names == tuple("0123456789")
    train, test = (np.bincount(split.labels) for split in (data.train, data.test))
    assert np.abs(test - 0.2 * (train + test)).max() <= 1
    assert data.train.images.min() == 0
    assert data.train.images.max() == 255
    assert (data.train.images[:, 0] == data.train.images[:, 2]).all()  # grey


def test_digits_are_those_that_scikit_learn_loads() -> None:
    raw, data = load_digits(), load("digits")
    sizes = np.bincount(data.train.labels) + np.bincount(data.test.labels)
    assert np.array_equal(sizes, np.bincount(raw.target))
    assert data.class_names == tuple(map(str, raw.target_names))
    ours = np.concatenate([data.train.images, data.test.images])[:, 0]
    enlarged = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in raw.images]
    theirs = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)) for image in enlarged])
    labels = np.concatenate([data.train.labels, data.test.labels])
    assert sorted(zip(labels, map(bytes, ours))) == sorted(zip(raw.target, map(bytes, theirs)))


def test_digits_split_belongs_to_the_data_and_not_to_the_experiment() -> None:
    assert np.array_equal(load("digits", seed=0).test.images, load("digits", seed=1).test.images)


def test_subset_is_seeded_balanced_and_part_of_the_whole() -> None:
    first, again, other = (load("digits", seed=seed, max_train=100, max_test=20) for seed in (0, 0, 1))
    assert np.bincount(first.train.labels).tolist() == [10] * 10
    assert len(first.test) == 20
    assert np.array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.images, other.train.images)
    whole = {image.tobytes() for image in load("digits").train.images}
    assert {image.tobytes() for image in first.train.images} <= whole
    assert len(load("digits", max_train=10**6).train) == len(load("digits").train)


def test_held_out_images_are_training_images_that_training_does_not_see() -> None:
    every = load("digits")
    held = load("digits", max_train=300, max_test=100, test_pool="train")
    assert np.array_equal(held.train.images, load("digits", max_train=300).train.images)
    rest = set(map(bytes, every.train.images)) - set(map(bytes, held.train.images))
    assert set(map(bytes, held.test.images)) <= rest
    assert len(held.test) == 100
    assert np.bincount(held.test.labels).tolist() == [10] * 10
    assert len(load("digits", max_train=300, test_pool="train").test) == len(every.train) - 300


@pytest.mark.parametrize("max_train", [None, 10**6])
def test_nothing_left_to_hold_out_is_one_clear_line(max_train: int | None) -> None:
    with pytest.raises(UserError, match=r"dataset\.max_train.* must leave some training images"):
        load("digits", max_train=max_train, test_pool="train")


@needs_cifar10
def test_cifar10_parquet_subset_is_balanced_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = Image.open

    def counted(*arguments: Any, **options: Any) -> Image.Image:
        opened.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(Image, "open", counted)
    data = load(f"parquet:{CIFAR10}", max_train=200, max_test=50)
    assert_well_formed(data, 32)
    assert np.bincount(data.train.labels).tolist() == [20] * 10
    assert np.bincount(data.test.labels).tolist() == [5] * 10
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert len(opened) <= 2 * 250  # at most a header and a decode for the chosen rows, never the other 59,750


@needs_cifar10
def test_cifar10_pixels_belong_to_their_labels() -> None:
    """Independent oracle: the chosen images, found again in the file by their decoded bytes, carry the same label."""
    data = load(f"parquet:{CIFAR10}", max_train=10, max_test=20)
    rows = pq.read_table(CIFAR10 / "test-00000-of-00001.parquet").to_pylist()
    known = {np.asarray(Image.open(io.BytesIO(r["img"]["bytes"]))).tobytes(): r["label"] for r in rows[:10000]}
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert known[image.transpose(1, 2, 0).tobytes()] == label


@needs_tiny
def test_tiny_imagenet_has_its_two_hundred_names() -> None:
    data = load(f"parquet:{TINY_IMAGENET}", max_train=200, max_test=200)
    assert_well_formed(data, 32)
    assert data.num_classes == 200
    assert data.class_names[0] == "n01443537"
    assert np.bincount(data.train.labels).tolist() == [1] * 200


@pytest.mark.parametrize("test_name", ["test", "valid", "validation"])
def test_parquet_keeps_one_native_size_and_joins_shards(tmp_path: Path, test_name: str) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1, 2])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [2, 1])
    write_parquet(tmp_path / f"{test_name}-00000-of-00001.parquet", [1, 0])
    data = load(f"parquet:{tmp_path}")
    assert_well_formed(data, 12)
    assert data.class_names == tuple(COLOURS)
    assert data.train.labels.tolist() == [0, 1, 2, 2, 1]
    assert data.train.images[:, :, 6, 6].argmax(axis=1).tolist() == [0, 1, 2, 2, 1]  # the colour is the class


def test_parquet_of_mixed_sizes_is_resized(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1], [png(COLOURS["red"]), png(COLOURS["green"], (20, 30))])
    write_parquet(tmp_path / "test-0.parquet", [1])
    assert_well_formed(load(f"parquet:{tmp_path}", image_size=16), 16)


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "flags", per_class=5)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("flags", "./flags", "~/flags"):
        assert len(load(f"imagefolder:{path}").train) == 12


@pytest.mark.parametrize("test_name", ["test", "val", "valid"])
def test_imagefolder_with_both_splits_is_cropped_and_resized(tmp_path: Path, test_name: str) -> None:
    write_folder(tmp_path / "train", per_class=4)
    write_folder(tmp_path / test_name, per_class=2, size=(16, 60))
    data = load(f"imagefolder:{tmp_path}", image_size=24)
    assert_well_formed(data, 24)
    assert data.class_names == ("blue", "green", "red")
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.test.images[:, :, 12, 12].argmax(axis=1).tolist() == (2 - data.test.labels).tolist()


def test_imagefolder_crops_the_centre(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        stripes = np.zeros((10, 30, 3), np.uint8)
        stripes[:, 10:20] = 200  # only the middle third is bright
        for j in range(5):
            Image.fromarray(stripes).save(tmp_path / name / f"{j}.png")
    assert (load(f"imagefolder:{tmp_path}", image_size=10).train.images == 200).all()


def test_imagefolder_of_class_folders_alone_is_split_by_class(tmp_path: Path) -> None:
    write_folder(tmp_path, per_class=10)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "red" / "notes.txt").write_text("not an image")
    data = load(f"imagefolder:{tmp_path}")
    assert data.class_names == ("blue", "green", "red")
    assert np.bincount(data.train.labels).tolist() == [8, 8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "damage", [b"", b"no image at all", *truncated(), broken_chunk()], ids=lambda b: f"{len(b)} bytes"
)
def test_a_damaged_image_is_named(tmp_path: Path, damage: bytes) -> None:
    write_folder(tmp_path / "train", per_class=2)
    write_folder(tmp_path / "test", per_class=2)
    (tmp_path / "train" / "green" / "1.png").write_bytes(damage)
    assert "green/1.png" in refused(f"imagefolder:{tmp_path}")


def test_a_test_class_that_is_never_trained_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", per_class=2)
    write_folder(tmp_path / "test", per_class=2)
    (tmp_path / "test" / "purple").mkdir()
    assert "purple" in refused(f"imagefolder:{tmp_path}")


def test_folders_that_hold_no_data_set_are_refused(tmp_path: Path) -> None:
    refused(f"imagefolder:{tmp_path}")
    refused(f"parquet:{tmp_path}")
    write_folder(tmp_path / "train", per_class=2)
    assert "test/" in refused(f"imagefolder:{tmp_path}")
    (tmp_path / "one" / "only").mkdir(parents=True)
    (tmp_path / "one" / "only" / "0.png").write_bytes(png(COLOURS["red"]))
    assert "class" in refused(f"imagefolder:{tmp_path / 'one'}")


@pytest.mark.parametrize("name", ["imagefolder:/no/such/place", "parquet:/no/such/place", "imagefolder:", "parquet:"])
def test_a_missing_path_is_refused(name: str) -> None:
    refused(name)


@pytest.mark.parametrize("name", ["mnist", "", "digits:", "cifar10:here", "Digits"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    line = refused(name)
    assert "digits" in line
    assert "parquet:PATH" in line


def test_corrupt_and_foreign_parquet_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test-0.parquet", [0, 1])
    train = tmp_path / "train-0.parquet"
    train.write_bytes(b"PAR1 this is not parquet PAR1")
    assert "train-0.parquet is not readable parquet" in refused(f"parquet:{tmp_path}")
    write_parquet(train, [0, 1, 2] * 50)
    train.write_bytes(train.read_bytes()[:-200])
    assert "train-0.parquet is not readable parquet" in refused(f"parquet:{tmp_path}")
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "y"]}), train)
    assert "has no image column" in refused(f"parquet:{tmp_path}")


def test_a_damaged_image_in_parquet_is_located(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "train-0.parquet", [0, 1, 2, 1], [png(COLOURS["red"])] * 2 + [b"junk", png(COLOURS["red"])]
    )
    write_parquet(tmp_path / "test-0.parquet", [0, 1])
    assert "row 2" in refused(f"parquet:{tmp_path}")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, -1, 1], "has label -1 in test-0.parquet, row 1"),
        ([0, 3, 1], "test-0.parquet, row 1, but only classes 0 to 2"),
        ([0, None, 1], "has 1 empty labels in test-0.parquet, the first in row 1"),
    ],
)
def test_labels_without_a_class_are_refused(tmp_path: Path, labels: list[int | None], says: str) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2])
    write_parquet(tmp_path / "test-0.parquet", labels, [png(COLOURS["red"])] * 3)
    assert says in refused(f"parquet:{tmp_path}")


def test_parquet_halves_that_name_different_classes_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2])
    write_parquet(tmp_path / "test-0.parquet", [0, 1, 2], names=["blue", "green", "red"])
    assert "has other class names in test-0.parquet than in train-0.parquet" in refused(f"parquet:{tmp_path}")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "gtsrb"])
def test_without_a_network_the_line_says_what_to_do(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    line = refused(name, root=str(tmp_path))
    assert str(tmp_path) in line
    assert "parquet:PATH" in line


def test_gtsrb_is_read_from_where_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("must not download what is there"))
    base = tmp_path / "gtsrb"
    tests = base / "GTSRB" / "Final_Test" / "Images"
    tests.mkdir(parents=True)
    for label in (0, 1):
        folder = base / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for j, size in enumerate([(30, 30), (50, 44)]):
            Image.new("RGB", size, (label * 200, 0, 0)).save(folder / f"{j}.ppm")
    Image.new("RGB", (35, 33), (200, 0, 0)).save(tests / "00000.ppm")
    (base / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;1\n")
    data = load("gtsrb", image_size=32, root=str(tmp_path))
    assert_well_formed(data, 32)
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert (data.train.images[:, 0, 0, 0] > 100).tolist() == [False, False, True, True]
    assert data.test.labels.tolist() == [1]


def test_a_limit_that_is_no_multiple_of_the_classes_leaves_out_any_of_them() -> None:
    labels = np.repeat(np.arange(10), 20)
    counts = np.array(
        [np.bincount(labels[_subset(labels, 25, seed, "train", "random")], minlength=10) for seed in range(200)]
    )
    assert set(counts.ravel()) == {2, 3}
    first = np.bincount(labels[_subset(labels, 25, 0, "train", "first")], minlength=10)
    assert first.tolist() == [3] * 5 + [2] * 5, "as in version 0.2"
    assert np.all(np.abs((counts == 3).sum(0) - 100) < 4 * 50**0.5)


@pytest.mark.parametrize(("side", "size"), [(16, 16), (32, 32), (64, 32)])
def test_squares_larger_than_the_model_are_scaled_down_with_a_filter(side: int, size: int) -> None:
    """The model resizes without one, and would see a few of their pixels only."""
    stripes = np.zeros((side, side, 3), np.uint8)
    stripes[:, ::2] = 200
    source = SimpleNamespace(image=lambda _: Image.fromarray(stripes), where=str)
    ((image, _),) = _decoded([(source, np.arange(2))], 32, may_keep=True)  # type: ignore[list-item]
    assert image.size == (size, size)
    assert np.median(np.asarray(image)[:, ::2]) == (200 if side <= 32 else 100)


def test_labels_that_a_data_set_transforms_are_read_from_its_pairs() -> None:
    """Its ``targets`` are those before the transform."""

    class Halves:
        targets = (0, 1, 2, 3)
        target_transform = None

        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
            return np.zeros((8, 8, 3), np.uint8), row % 2

    half = Halves()
    assert _pairs(half, "x")[1].tolist() == [0, 1, 2, 3]
    half.target_transform = lambda label: label % 2  # type: ignore[assignment]
    assert _pairs(half, "x")[1].tolist() == [0, 1, 0, 1]


def test_a_subset_says_which_classes_it_lacks() -> None:
    few = load_dataset(DatasetSection(name="digits", max_train=8, max_test=20), 8, seed=0)
    assert np.unique(few.train.labels).size == 8
    (notice,) = few.notices
    assert notice.startswith("digits (a subset: dataset.max_train, max_test): 2 of 10 classes have no training images")
    assert not load_dataset(DatasetSection(name="digits"), 8, seed=0).notices

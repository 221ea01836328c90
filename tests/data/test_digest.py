"""A digest changes with everything that a run computes with, and with nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sylva_ray.config.data import DatasetSection, PartitionSection
from sylva_ray.core.types import Split
from sylva_ray.data.datasets import Dataset, load_dataset
from sylva_ray.data.digest import DataDigest, data_digest
from sylva_ray.data.fleet import ClientIndices, FleetData, build_fleet

PARTITION = PartitionSection(kind="iid", num_clients=2, min_samples=5, test_samples=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 30 images of noise."""
    root = tmp_path_factory.mktemp("images") / "first"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for j in range(30):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(root / name / f"{j:02d}.png")
    return root


def fleet_of(root: Path, partition: PartitionSection = PARTITION, seed: int = 0) -> FleetData:
    return build_fleet(load_dataset(DatasetSection(name=f"imagefolder:{root}"), 16, 0), partition, seed)


@pytest.fixture(scope="module")
def fleet(folder: Path) -> FleetData:
    return fleet_of(folder)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def with_dataset(fleet: FleetData, **parts: Any) -> FleetData:
    return dataclasses.replace(fleet, dataset=dataclasses.replace(fleet.dataset, **parts))


def test_the_same_files_in_another_folder_have_the_same_digest(folder: Path, fleet: FleetData, tmp_path: Path) -> None:
    copy = tmp_path / "a" / "copy"
    shutil.copytree(folder, copy)
    assert data_digest(fleet_of(copy)) == data_digest(fleet)


def test_the_definition_does_not_change_between_versions() -> None:
    split = Split(np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2), np.array([1]))
    indices = ClientIndices(*(np.array([j]) for j in range(4)))
    half = sha256(b"(1, 3, 2, 2)" + bytes(range(12)) + b"(1,)" + (1).to_bytes(8, "little"))
    assert data_digest(FleetData(Dataset("toy", split, split, ("a", "bc")), (indices,))) == DataDigest(
        train=half,
        test=half,
        class_names=sha256(b"1:a2:bc"),
        partition=sha256(b"".join(b"(1,)" + j.to_bytes(8, "little") for j in range(4))),
    )


def test_the_types_and_the_layout_of_the_arrays_do_not_matter(fleet: FleetData) -> None:
    train = fleet.dataset.train
    other = Split(np.asfortranarray(train.images), train.labels.astype(">i4"))
    assert data_digest(with_dataset(fleet, train=other)) == data_digest(fleet)


@pytest.mark.parametrize("half", ["train", "test"])
def test_a_pixel_a_label_or_the_order_changes_the_digest_of_its_half(fleet: FleetData, half: str) -> None:
    split: Split = getattr(fleet.dataset, half)
    images, labels = split.images.copy(), split.labels.copy()
    images[3, 1, 5, 7] ^= 1
    labels[0] = 1 - labels[0]
    backwards = Split(split.images[::-1], split.labels[::-1])
    longer = Split(np.concatenate([split.images, split.images[:1]]), np.append(split.labels, split.labels[0]))
    for changed in (Split(images, split.labels), Split(split.images, labels), backwards, longer):
        assert data_digest(with_dataset(fleet, **{half: changed})).differences(data_digest(fleet)) == (half,)


def test_names_are_digested_with_their_borders_and_order(fleet: FleetData) -> None:
    digests = {
        data_digest(with_dataset(fleet, class_names=names)).class_names
        for names in [("cat", "dog"), ("dog", "cat"), ("catd", "og"), ("cat", "dog", ""), ("c\u00e4t", "dog")]
    }
    assert len(digests) == 5


def test_the_partition_is_digested_apart_from_the_images(folder: Path, fleet: FleetData) -> None:
    digest = data_digest(fleet)
    three = PARTITION.model_copy(update={"num_clients": 3})
    for other in (fleet_of(folder, seed=1), fleet_of(folder, three)):
        assert data_digest(other).differences(digest) == ("partition",)
    first, second = fleet.clients
    exchanged = dataclasses.replace(first, selection=first.guard, guard=first.selection)
    for clients in [(second, first), (exchanged, second)]:
        assert data_digest(dataclasses.replace(fleet, clients=clients)).differences(digest) == ("partition",)


def test_one_more_file_changes_the_digest(folder: Path, fleet: FleetData, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    shutil.copytree(folder, grown)
    Image.new("RGB", (16, 16), "white").save(grown / "cat" / "new.png")
    assert {"train", "partition"} <= set(data_digest(fleet_of(grown)).differences(data_digest(fleet)))


def test_a_digest_of_the_size_of_cifar10_takes_a_fraction_of_a_second(fleet: FleetData) -> None:
    pixels = np.zeros((60_000, 3, 32, 32), np.uint8)
    large = with_dataset(fleet, train=Split(pixels, np.zeros(60_000, np.int64)))
    started = time.process_time()
    data_digest(large)
    assert time.process_time() - started < 1.0

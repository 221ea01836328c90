"""A client's four splits: disjoint, stratified, in its own proportions (T0.3)."""

import pickle
from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sylva_ray.config.data import PartitionSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import Split
from sylva_ray.data.datasets import Dataset, Labels
from sylva_ray.data.digest import _partition_digest
from sylva_ray.data.fleet import FleetData, build_fleet, divide, half_of_each_class, stratified_choice


def split(labels: np.ndarray) -> Split:
    """Image j is filled with the two bytes of j, so that a slice can be recognised."""
    index = np.arange(len(labels))
    images = np.stack([index // 256, index % 256, labels], axis=1).astype(np.uint8)
    return Split(np.broadcast_to(images[:, :, None, None], (len(labels), 3, 4, 4)).copy(), labels.astype(np.int64))


def dataset(train: tuple[int, ...] = (200,) * 10, test: tuple[int, ...] = (100,) * 10) -> Dataset:
    """``train`` and ``test``: images per class."""
    train_split, test_split = (split(np.repeat(np.arange(len(sizes)), sizes)) for sizes in (train, test))
    return Dataset("toy", train_split, test_split, class_names=tuple(f"class {c}" for c in range(len(train))))


def shares(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=num_classes) / len(labels)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(("iid", "dirichlet", "pathological", "quantity")),
    clients=st.integers(1, 40),
    minimum=st.integers(5, 20),
    valid_fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
@example(kind="iid", clients=40, minimum=5, valid_fraction=0.99, seed=0)
def test_splits_are_disjoint_cover_the_training_images_and_are_never_empty(
    kind: str, clients: int, minimum: int, valid_fraction: float, seed: int
) -> None:
    section = PartitionSection(
        kind=kind, num_clients=clients, min_samples=minimum, valid_fraction=valid_fraction, alpha=0.1
    )
    fleet = build_fleet(dataset(), section, seed)
    trained = np.concatenate([np.concatenate([c.train, c.selection, c.guard]) for c in fleet.clients])
    assert np.array_equal(np.sort(trained), np.arange(2000))  # within and between clients
    for indices in fleet.clients:
        assert min(map(len, (indices.train, indices.selection, indices.guard, indices.test))) >= 1
        assert abs(len(indices.selection) - len(indices.guard)) <= 1
        assert len(np.unique(indices.test)) == len(indices.test) == min(section.test_samples, 1000)


def test_validation_is_the_stated_fraction_and_stratified() -> None:
    fleet = build_fleet(dataset(), PartitionSection(kind="pathological", num_clients=10, valid_fraction=0.2), 0)
    for i, indices in enumerate(fleet.clients):
        held = len(indices.train) + len(indices.selection) + len(indices.guard)
        assert len(indices.selection) + len(indices.guard) == pytest.approx(0.2 * held, abs=1)
        client = fleet.client(i)
        own = shares(client.train.labels, 10)
        for part in (client.selection, client.guard):
            assert np.abs(shares(part.labels, 10) - own).max() <= 2 / len(part)


def test_test_splits_have_the_clients_class_proportions() -> None:
    fleet = build_fleet(dataset(), PartitionSection(num_clients=8, alpha=0.3, test_samples=60), 0)
    for i, indices in enumerate(fleet.clients):
        mine = np.concatenate([indices.train, indices.selection, indices.guard])
        wanted = shares(fleet.dataset.train.labels[mine], 10)
        assert np.abs(np.bincount(fleet.client(i).test.labels, minlength=10) - 60 * wanted).max() < 1


def test_test_splits_with_equal_shares_have_as_many_images_of_every_class_among_100_with_own_shares() -> None:
    own, equal = (
        build_fleet(dataset(), PartitionSection(num_clients=8, alpha=0.3, test_samples=size, test_shares=shares), 0)
        for shares, size in (("own", 100), ("equal", 60))
    )
    for i, indices in enumerate(equal.clients):
        before, after = (np.bincount(fleet.client(i).test.labels, minlength=10) for fleet in (own, equal))
        assert after.sum() == 60
        assert ((after > 0) == (before > 0)).all()
        assert np.ptp(after[after > 0]) <= 1
        for split in ("train", "selection", "guard"):
            assert np.array_equal(getattr(indices, split), getattr(own.clients[i], split))


def test_with_equal_shares_the_classes_do_not_depend_on_the_number_of_test_images() -> None:
    def classes(size: int) -> list[list[int]]:
        section = PartitionSection(num_clients=8, alpha=0.3, test_samples=size, test_shares="equal")
        fleet = build_fleet(dataset(), section, 0)
        return [np.unique(fleet.test_labels(client)).tolist() for client in range(8)]

    assert classes(20) == classes(100) == classes(300)


def test_with_equal_shares_the_class_with_the_fewest_test_images_limits_all() -> None:
    section = PartitionSection(num_clients=1, test_samples=40, test_shares="equal")
    fleet = build_fleet(dataset((40, 20, 20), (4, 50, 50)), section, 0)
    assert np.bincount(fleet.client(0).test.labels).tolist() == [4, 4, 4]
    assert fleet.client(0).majority_share == 1 / 3


def test_a_small_class_gives_what_it_has_and_the_others_fill_up() -> None:
    # One client, half of class 0 and a quarter of 1 and 2 each; of 40 test images class 0 can give only 4 of its 20.
    fleet = build_fleet(dataset((40, 20, 20), (4, 50, 50)), PartitionSection(num_clients=1, test_samples=40), 0)
    assert np.bincount(fleet.client(0).test.labels).tolist() == [4, 18, 18]


def test_fewer_test_images_than_wanted_gives_all_of_the_clients_classes_and_no_other() -> None:
    section = PartitionSection(kind="pathological", num_clients=4, classes_per_client=1, test_samples=99)
    fleet = build_fleet(dataset((50,) * 4, (7, 8, 9, 10)), section, 0)
    for i in range(4):
        client = fleet.client(i)
        (label,) = np.unique(client.train.labels)
        assert np.array_equal(client.test.labels, np.full(7 + label, label))


def test_a_client_without_any_test_image_is_refused_by_name() -> None:
    section = PartitionSection(kind="pathological", num_clients=2, classes_per_client=1)
    with pytest.raises(UserError, match="class 1"):
        build_fleet(dataset((50, 50), (20, 0)), section, 0)


def test_client_slices_are_the_indexed_images() -> None:
    fleet = build_fleet(dataset(), PartitionSection(), 0)
    indices, client = fleet.clients[3], fleet.client(3)
    for part, rows in ((client.train, indices.train), (client.guard, indices.guard), (client.test, indices.test)):
        assert np.array_equal(part.images[:, 0, 0, 0].astype(int) * 256 + part.images[:, 1, 0, 0], rows)
        assert np.array_equal(part.images[:, 2, 0, 0], part.labels)


def test_label_matrix_counts_training_images() -> None:
    fleet = build_fleet(dataset(), PartitionSection(num_clients=6), 0)
    matrix = fleet.label_matrix()
    assert (fleet.num_clients, fleet.num_classes) == matrix.shape == (6, 10)
    assert matrix.dtype == np.int64
    assert all(np.array_equal(matrix[i], fleet.client(i).class_counts(10)) for i in range(6))


def test_the_same_seed_gives_the_same_fleet() -> None:
    first, again, other = (build_fleet(dataset(), PartitionSection(), seed) for seed in (1, 1, 2))

    def everything(fleet: FleetData) -> np.ndarray:
        return np.concatenate([np.concatenate([c.train, c.selection, c.guard, c.test]) for c in fleet.clients])

    assert np.array_equal(everything(first), everything(again))
    assert not np.array_equal(everything(first), everything(other))


def test_pickling_keeps_the_images_out_of_band() -> None:
    fleet = build_fleet(dataset(), PartitionSection(), 0)
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(fleet, protocol=5, buffer_callback=buffers.append)
    assert len(head) < 20_000 < fleet.dataset.train.images.nbytes
    back = pickle.loads(head, buffers=buffers)
    assert np.shares_memory(back.dataset.train.images, fleet.dataset.train.images)
    assert np.array_equal(back.client(0).train.images, fleet.client(0).train.images)


@pytest.mark.parametrize(("shares", "digest"), [("own", "00bddd8dc4ab2acf"), ("equal", "44d1e39411e03a21")])
def test_splits_of_version_0_2_can_be_had(shares: Literal["own", "equal"], digest: str) -> None:
    """The digests are those of that version."""
    names = tuple(map(str, range(13)))
    labels = Labels("toy", np.repeat(np.arange(13), 40), np.repeat(np.arange(13), 25), names)
    section = PartitionSection(num_clients=5, test_shares=shares, test_samples=30, leftovers="first")
    assert _partition_digest(divide(labels, section, 3)).startswith(digest)
    new = divide(labels, section.model_copy(update={"leftovers": "random"}), 3)
    assert not _partition_digest(new).startswith(digest)


@pytest.mark.parametrize("shares", ["own", "equal"])
def test_no_split_prefers_classes_by_their_number(shares: Literal["own", "equal"]) -> None:
    """Odd images of a class go to either half, and a test set that is too small for all classes has any of them."""
    names = tuple(map(str, range(40)))
    labels = Labels("toy", np.repeat(np.arange(40), 50), np.repeat(np.arange(40), 30), names)
    section = PartitionSection(kind="iid", num_clients=40, test_shares=shares, test_samples=30)
    clients = divide(labels, section, 0)
    for kind, source in (("selection", labels.train), ("guard", labels.train), ("test", labels.test)):
        drawn = np.concatenate([source[getattr(client, kind)] for client in clients])
        error = 40 / 12**0.5 / len(drawn) ** 0.5
        assert abs(drawn.mean() - 19.5) < 4 * error, (kind, drawn.mean())
    rng = np.random.default_rng(0)
    for labels_of_client in ([0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 3], [0] + [1] * 7 + [2] * 20 + [3] * 3):
        halves = np.array(labels_of_client)
        chosen = [halves[half_of_each_class(halves, rng)] for _ in range(400)]
        assert {len(half) for half in chosen} == {len(halves) // 2}
        (odd,) = np.nonzero(np.bincount(halves) % 2)
        singles = sum(int((half == 0).sum()) for half in chosen)  # the one image of class 0
        assert abs(singles - 400 * (len(odd) // 2) / len(odd)) < 4 * 10
    counts = sum(np.bincount(stratified_choice(np.arange(10), 5, rng), minlength=10) for _ in range(400))
    assert np.all(np.abs(np.asarray(counts) - 200) < 4 * 10)

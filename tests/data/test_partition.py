"""Partitions cover, never overlap, keep the minimum, and end (T0.1, T0.2)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_ray.config.data import PartitionSection
from sylva_ray.core.errors import UserError
from sylva_ray.data.partition import largest_remainder, partition_labels

KINDS = ("iid", "dirichlet", "pathological", "quantity")


def labelled(num_classes: int = 10, per_class: int = 100) -> np.ndarray:
    """Sorted by class, the worst order for a careless partition."""
    return np.repeat(np.arange(num_classes), per_class)


def classes_held(parts: list[np.ndarray], labels: np.ndarray) -> list[int]:
    return [len(np.unique(labels[part])) for part in parts]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    clients=st.integers(1, 60),
    minimum=st.integers(5, 15),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    classes_per_client=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 400), min_size=4, max_size=12),
    seed=st.integers(0, 2**31),
)
def test_every_kind_covers_all_images_once_and_keeps_the_minimum(
    kind: str, clients: int, minimum: int, alpha: float, classes_per_client: int, sizes: list[int], seed: int
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    section = PartitionSection(
        kind=kind, num_clients=clients, min_samples=minimum, alpha=alpha, classes_per_client=classes_per_client
    )
    if clients * minimum > len(labels):
        with pytest.raises(UserError, match=r"partition\.num_clients"):
            partition_labels(labels, section, seed)
        return
    parts = partition_labels(labels, section, seed)
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))  # disjoint and covering
    assert min(map(len, parts)) >= minimum
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_partition(kind: str) -> None:
    labels, section = labelled(), PartitionSection(kind=kind, num_clients=7)
    first, again, other = (partition_labels(labels, section, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tightest_minimum_gives_everybody_exactly_that(kind: str) -> None:
    section = PartitionSection(kind=kind, num_clients=50, min_samples=20, alpha=1e-3)
    assert set(map(len, partition_labels(labelled(), section, 0))) == {20}


@pytest.mark.parametrize("alpha", [1e6, 1e30])
def test_large_alpha_gives_uniform_class_shares(alpha: float) -> None:
    labels = labelled(per_class=200)
    parts = partition_labels(labels, PartitionSection(num_clients=5, alpha=alpha), 0)
    counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
    assert np.abs(counts - 40).max() <= 2


def test_small_alpha_gives_clients_at_most_two_classes_typically() -> None:
    labels = labelled(per_class=200)
    held = [
        count
        for seed in range(10)
        for count in classes_held(partition_labels(labels, PartitionSection(alpha=1e-3), seed), labels)
    ]
    assert np.median(held) <= 2


def test_vanishing_alpha_deals_whole_classes() -> None:
    # 20 equal classes, 10 clients: the balance rule closes a client after its second class, so each has exactly two.
    labels = labelled(num_classes=20, per_class=50)
    for seed in range(5):
        parts = partition_labels(labels, PartitionSection(num_clients=10, alpha=1e-7), seed)
        assert classes_held(parts, labels) == [2] * 10


def test_huge_alpha_gives_equal_sizes_under_quantity_skew() -> None:
    parts = partition_labels(labelled(), PartitionSection(kind="quantity", alpha=1e30), 0)
    assert max(abs(len(part) - 100) for part in parts) <= 1


def test_the_balance_rule_bounds_a_client_by_its_share_plus_one_class() -> None:
    labels = labelled(num_classes=20, per_class=50)
    for seed in range(10):
        parts = partition_labels(labels, PartitionSection(num_clients=5, alpha=0.05), seed)
        assert max(map(len, parts)) < len(labels) / 5 + 50


@pytest.mark.parametrize("classes_per_client", [1, 2, 3])
def test_pathological_clients_hold_exactly_their_number_of_classes(classes_per_client: int) -> None:
    labels = labelled()
    section = PartitionSection(kind="pathological", num_clients=20, classes_per_client=classes_per_client)
    assert classes_held(partition_labels(labels, section, 1), labels) == [classes_per_client] * 20


def test_pathological_with_fewer_places_than_classes_drops_no_class() -> None:
    labels = labelled()
    parts = partition_labels(labels, PartitionSection(kind="pathological", num_clients=3, classes_per_client=2), 0)
    assert sum(classes_held(parts, labels)) == 10


def test_topping_up_keeps_a_pathological_client_to_its_classes() -> None:
    # One class is so small that its holders are short, and every holder's other class has images to spare.
    labels = np.repeat(np.arange(4), [400, 400, 400, 4])
    section = PartitionSection(kind="pathological", num_clients=6, classes_per_client=2, min_samples=150)
    assert max(classes_held(partition_labels(labels, section, 0), labels)) <= 2


def test_quantity_skew_keeps_labels_iid_even_when_images_are_moved() -> None:
    labels = labelled(num_classes=4, per_class=500)
    parts = partition_labels(labels, PartitionSection(kind="quantity", num_clients=10, alpha=0.01, min_samples=100), 0)
    sizes = sorted(map(len, parts))
    assert sizes[0] == 100  # it had to be topped up
    assert sizes[-1] > 400  # and is skewed
    shares = np.stack([np.bincount(labels[part], minlength=4) / len(part) for part in parts])
    assert np.abs(shares - 0.25).max() < 0.2  # 4.6 standard deviations of a share of 100 images


def test_too_many_clients_says_both_numbers() -> None:
    with pytest.raises(UserError, match=r"partition\.num_clients") as caught:
        partition_labels(labelled(per_class=10), PartitionSection(num_clients=11, min_samples=10), 0)
    assert "100" in str(caught.value)
    assert "11" in str(caught.value)


def test_more_classes_per_client_than_there_are_is_refused() -> None:
    section = PartitionSection(kind="pathological", classes_per_client=11)
    with pytest.raises(UserError, match=r"partition\.classes_per_client"):
        partition_labels(labelled(), section, 0)


@given(weights=st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any), total=st.integers(0, 500))
def test_largest_remainder_sums_to_the_total_within_one_of_each_share(weights: list[int], total: int) -> None:
    shares = np.array(weights) / sum(weights)
    counts = largest_remainder(shares, total)
    assert counts.sum() == total
    assert np.abs(counts - shares * total).max() < 1 + 1e-6
    assert (counts[shares == 0] == 0).all()

"""The data of a fleet: one data set, and the images that each client holds in each split.

Training, selection and guard images come from the training half of the data set and never overlap, within a client or
between clients. Test images come from the test half (or, with ``dataset.test_pool=train``, from training images that no
client trains on). They have the client's own class proportions, or equal ones, and clients may share them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sylva_ray.config.data import PartitionSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import ClientData, Split
from sylva_ray.data.datasets import Dataset, Labels
from sylva_ray.data.partition import largest_remainder, partition_labels


@dataclass(frozen=True)
class ClientIndices:
    """The images of one client, as sorted int64 indices.

    Attributes:
        train: of the training half, to train on.
        selection: of the training half, to choose layers by.
        guard: of the training half, to accept or reject a choice by.
        test: of the test pool.
    """

    train: np.ndarray
    selection: np.ndarray
    guard: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class FleetData:
    """The data of all clients.

    It holds plain numpy arrays, so that one copy in shared memory serves every worker of a node.

    Attributes:
        dataset: the images of all.
        clients: the indices of each client.
    """

    dataset: Dataset
    clients: tuple[ClientIndices, ...]

    @property
    def num_clients(self) -> int:
        """Number of clients, K."""
        return len(self.clients)

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set; a client may have fewer."""
        return self.dataset.num_classes

    def client(self, client: int) -> ClientData:
        """Return one client's images and labels, as copies."""
        indices = self.clients[client]
        train, test = self.dataset.train, self.dataset.test
        return ClientData(
            train=_take(train, indices.train),
            selection=_take(train, indices.selection),
            guard=_take(train, indices.guard),
            test=_take(test, indices.test),
        )

    def test_labels(self, client: int) -> np.ndarray:
        """Return the labels of one client's test images, ``[n] int64``."""
        labels: np.ndarray = self.dataset.test.labels[self.clients[client].test]
        return labels

    def num_test_images(self, clients: Iterable[int], limit: int | None = None) -> int:
        """Return how many distinct images some clients are tested on, since they may share some.

        Args:
            clients: their numbers.
            limit: the first images of each client; None: all.
        """
        return len(np.unique(np.concatenate([self.clients[client].test[:limit] for client in clients])))

    def label_matrix(self) -> np.ndarray:
        """Return the number of training images per client and class, ``[K, num_classes] int64``."""
        return self._label_matrix

    @cached_property
    def _label_matrix(self) -> np.ndarray:
        labels = self.dataset.train.labels
        return np.stack([np.bincount(labels[indices.train], minlength=self.num_classes) for indices in self.clients])


TYPICAL_IMAGES = 100
"""With equal shares, a client is tested on the classes that are among so many images with its own shares.

A class of which it has hardly an image would else count as much as those that it sees every day.
"""


def build_fleet(dataset: Dataset, section: PartitionSection, seed: int) -> FleetData:
    """Divide a data set among clients; see `divide`."""
    return FleetData(dataset, divide(dataset.labels, section, seed))


def divide(labels: Labels, section: PartitionSection, seed: int) -> tuple[ClientIndices, ...]:
    """Partition images among clients and split each client's images, by their labels alone.

    Args:
        labels: of both halves of the data set.
        section: number of clients, kind of partition, sizes of the splits.
        seed: seed of the experiment.

    Raises:
        UserError: the partition is impossible (`sylva_ray.data.partition.partition_labels`), or the test half has no
            image of a client's classes.
    """
    clients = []
    num_classes = len(labels.class_names)
    for client, indices in enumerate(partition_labels(labels.train, section, seed)):
        rng = numpy_generator(seed, "splits", client)
        own = labels.train[indices]
        num_valid = min(max(2, round(section.valid_fraction * len(indices))), len(indices) - 1)
        is_random = section.leftovers == "random"
        valid = stratified_choice(own, num_valid, rng, is_random)
        if is_random:
            selection = valid[half_of_each_class(own[valid], rng)]
        else:
            selection = valid[stratified_choice(own[valid], num_valid // 2, rng, is_random)]
        guard = np.setdiff1d(valid, selection)
        train = np.setdiff1d(np.arange(len(indices)), valid)
        proportions = np.bincount(own, minlength=num_classes) / len(own)
        draw = draw_equally if section.test_shares == "equal" else draw_with_proportions
        test = draw(labels.test, proportions, section.test_samples, rng, is_random)
        if not len(test):
            wanted = ", ".join(labels.class_names[c] for c in np.flatnonzero(proportions))
            fix = (
                f"has no test image of client {client}'s classes ({wanted}); raise dataset.max_test or add test images"
            )
            raise UserError("dataset.name", labels.name, fix)
        clients.append(ClientIndices(indices[train], indices[selection], indices[guard], test))
    return tuple(clients)


def stratified_choice(labels: np.ndarray, size: int, rng: np.random.Generator, is_random: bool = True) -> np.ndarray:
    """Choose images with about the class proportions of all of them.

    Args:
        labels: ``[n] int64``, the classes of the images.
        size: number of images to choose.
        rng: source of the random numbers.
        is_random: as of `draw_with_proportions`.

    Returns:
        ``[size] int``, sorted indices.
    """
    proportions = np.bincount(labels) / len(labels)
    return draw_with_proportions(labels, proportions, size, rng, is_random)


def half_of_each_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose half of the images of every class, rounded down; of half of the classes with an odd number one more.

    Args:
        labels: ``[n] int64``, the classes of the images.
        rng: source of the random numbers. It draws which classes get one more, too.

    Returns:
        ``[n // 2] int``, sorted indices.
    """
    numbers = np.bincount(labels)
    odd = rng.permutation(np.flatnonzero(numbers % 2))
    counts = numbers // 2
    counts[odd[: len(odd) // 2]] += 1
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:count] for c, count in enumerate(counts)]
    return np.sort(np.concatenate(chosen))


def draw_with_proportions(
    labels: np.ndarray, proportions: np.ndarray, size: int, rng: np.random.Generator, is_random: bool = True
) -> np.ndarray:
    """Choose images without replacement, with given class proportions (rounded by the largest remainder).

    Where a class has too few images, all of them are chosen and the other classes make up for them.

    Args:
        labels: ``[n] int64``, the classes of the images.
        proportions: ``[num_classes]``, of sum 1.
        size: number of images to choose.
        rng: source of the random numbers.
        is_random: whether it is drawn which of several classes of equal remainder gets an image more. Otherwise it is
            the first ones in every client, and classes are missing from small splits.

    Returns:
        Sorted indices: ``size`` of them, or all images of the classes in ``proportions`` if these are fewer.
    """
    available = np.bincount(labels, minlength=len(proportions))[: len(proportions)]
    counts = np.zeros(len(proportions), int)
    order = rng.permutation(len(proportions)) if is_random else np.arange(len(proportions))
    open_classes = (proportions > 0) & (available > 0)
    while (missing := size - counts.sum()) > 0 and open_classes.any():
        weights = np.where(open_classes, proportions, 0.0)
        more = np.zeros(len(proportions), int)
        more[order] = largest_remainder(weights[order] / weights.sum(), missing)
        counts = np.minimum(counts + more, available)
        open_classes &= counts < available
    chosen = [rng.permutation(np.flatnonzero(labels == c))[: counts[c]] for c in np.flatnonzero(counts)]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, int)


def draw_equally(
    labels: np.ndarray, proportions: np.ndarray, size: int, rng: np.random.Generator, is_random: bool = True
) -> np.ndarray:
    """Choose as many images of every class that is among `TYPICAL_IMAGES` images of `draw_with_proportions`.

    The arguments are those of that function. Returns ``size`` sorted indices, or fewer if one of the classes has fewer
    images than its share; the numbers of two classes differ by at most one.
    """
    typical = labels[draw_with_proportions(labels, proportions, TYPICAL_IMAGES, rng, is_random)]
    is_chosen = np.bincount(typical, minlength=len(proportions)) > 0
    if not is_chosen.any():
        return np.zeros(0, int)
    smallest = np.bincount(labels, minlength=len(proportions))[: len(proportions)][is_chosen].min()
    size = min(size, smallest * is_chosen.sum())
    return draw_with_proportions(labels, is_chosen / is_chosen.sum(), size, rng, is_random)


def _take(split: Split, rows: np.ndarray) -> Split:
    return Split(split.images[rows], split.labels[rows])

"""The fleet's data: one data set, and which of its images each client holds in which split.

Training, selection and guard images come from the data set's training half and never overlap, within a client or between
clients. Test images come from its test half (or from training images held out of it all, ``dataset.test_pool``) with the
client's own class proportions; they may be shared between clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sylva_ray.config.experiment import PartitionSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import ClientData, Split
from sylva_ray.data.datasets import Dataset
from sylva_ray.data.partition import largest_remainder, partition_labels


@dataclass(frozen=True)
class ClientIndices:
    """Sorted int64 positions: ``train``, ``selection``, ``guard`` in the training half, ``test`` in the test pool."""

    train: np.ndarray
    selection: np.ndarray
    guard: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class FleetData:
    """All clients' data. Plain numpy arrays inside, so one copy in shared memory serves every worker of a node."""

    dataset: Dataset
    clients: tuple[ClientIndices, ...]

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.clients)

    @property
    def num_classes(self) -> int:
        """Classes of the data set (a client may see fewer)."""
        return self.dataset.num_classes

    def client(self, client: int) -> ClientData:
        """One client's slices (copies)."""
        own = self.clients[client]
        train, test = self.dataset.train, self.dataset.test
        return ClientData(
            train=_take(train, own.train),
            selection=_take(train, own.selection),
            guard=_take(train, own.guard),
            test=_take(test, own.test),
        )

    def test_labels(self, client: int) -> np.ndarray:
        """Labels of one client's test images, ``[n] int64``, without the images."""
        return self.dataset.test.labels[self.clients[client].test]

    def label_matrix(self) -> np.ndarray:
        """Training images per client and class, ``[K, num_classes] int64``."""
        return self._label_matrix

    @cached_property
    def _label_matrix(self) -> np.ndarray:
        labels = self.dataset.train.labels
        return np.stack([np.bincount(labels[own.train], minlength=self.num_classes) for own in self.clients])


def build_fleet(dataset: Dataset, section: PartitionSection, seed: int) -> FleetData:
    """Deal ``dataset`` to ``section.num_clients`` clients and split each one's share.

    Raises:
        UserError: see `sylva_ray.data.partition.partition_labels`; or a client's classes have no test image.
    """
    clients = []
    for client, indices in enumerate(partition_labels(dataset.train.labels, section, seed)):
        rng = numpy_generator(seed, "splits", client)
        labels = dataset.train.labels[indices]
        num_valid = min(max(2, round(section.valid_fraction * len(indices))), len(indices) - 1)
        valid = stratified_choice(labels, num_valid, rng)
        selection = valid[stratified_choice(labels[valid], num_valid // 2, rng)]
        guard = np.setdiff1d(valid, selection)
        train = np.setdiff1d(np.arange(len(indices)), valid)
        proportions = np.bincount(labels, minlength=dataset.num_classes) / len(labels)
        test = draw_with_proportions(dataset.test.labels, proportions, section.test_samples, rng)
        if not len(test):
            wanted = ", ".join(dataset.class_names[c] for c in np.flatnonzero(proportions))
            fix = f"has no test image of client {client}'s classes ({wanted}); raise dataset.max_test or add some"
            raise UserError("dataset.name", dataset.name, fix)
        clients.append(ClientIndices(indices[train], indices[selection], indices[guard], test))
    return FleetData(dataset, tuple(clients))


def stratified_choice(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """``size`` sorted positions in ``labels`` with about its class proportions."""
    proportions = np.bincount(labels) / len(labels)
    return draw_with_proportions(labels, proportions, size, rng)


def draw_with_proportions(
    labels: np.ndarray, proportions: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """``size`` sorted positions without replacement, classes in ``proportions`` (summing to 1) by largest remainder.

    A class that has too few gives what it has, and the rest is dealt to the other classes wanted; fewer than ``size`` come
    back only where all of those are used up.
    """
    available = np.bincount(labels, minlength=len(proportions))[: len(proportions)]
    counts = np.zeros(len(proportions), int)
    open_classes = (proportions > 0) & (available > 0)
    while (missing := size - counts.sum()) > 0 and open_classes.any():
        shares = np.where(open_classes, proportions, 0.0)
        counts = np.minimum(counts + largest_remainder(shares / shares.sum(), missing), available)
        open_classes &= counts < available
    chosen = [rng.permutation(np.flatnonzero(labels == c))[: counts[c]] for c in np.flatnonzero(counts)]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, int)


def _take(split: Split, rows: np.ndarray) -> Split:
    return Split(split.images[rows], split.labels[rows])

"""Partition images among clients: IID, label skew (Dirichlet, pathological) or quantity skew.

Every image belongs to exactly one client, and every client has at least ``partition.min_samples`` images. A partition
is drawn at most `MAX_DRAWS` times; if the last one leaves a client short, images are moved to it from the largest
clients.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sylva_ray.config.data import PartitionSection
from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.own_code import load_attribute
from sylva_ray.core.seeding import numpy_generator

MAX_DRAWS = 20
"""Partitions that are drawn before images are moved."""

MAX_ALPHA = 1e6
"""Largest Dirichlet concentration that is sampled; larger ones give the same proportions to a thousandth."""


def partition_labels(labels: np.ndarray, section: PartitionSection, seed: int) -> list[np.ndarray]:
    """Partition images by their labels.

    Args:
        labels: ``[n] int64``, the classes of the images.
        section: kind of partition, number of clients, minimum per client.
        seed: seed of the experiment.

    Returns:
        One sorted array of indices per client; together they cover ``labels``, and they do not overlap.

    Raises:
        UserError: there are fewer images than the clients' minimum needs, or fewer classes than each client is to hold.
    """
    n, clients, minimum = len(labels), section.num_clients, section.min_samples
    if clients * minimum > n:
        limits = f"{n} training images are too few for {minimum} each (partition.min_samples)"
        fewer = f"use at most {n // minimum} clients" if n >= minimum else "lower partition.min_samples, or use more"
        raise UserError("partition.num_clients", clients, f"{limits}; {fewer}")
    num_classes = len(np.unique(labels))
    if section.kind == "pathological" and section.classes_per_client > num_classes:
        raise UserError(
            "partition.classes_per_client", section.classes_per_client, f"the data has {num_classes} classes"
        )
    rng = numpy_generator(seed, "partition")
    draw = PARTITIONS[section.kind] if section.kind in PARTITIONS else own_partition(section.kind)
    for _ in range(MAX_DRAWS):
        owner = draw(labels, section, rng)
        if np.bincount(owner, minlength=clients).min() >= minimum:
            break
    # Quantity skew leaves labels iid, so any image may be moved.
    kinds = np.zeros_like(labels) if section.kind == "quantity" else labels
    owner = _with_minimum(owner, kinds, clients, minimum, rng.permutation(n))
    return [np.flatnonzero(owner == client) for client in range(clients)]


Partition = Callable[[np.ndarray, PartitionSection, np.random.Generator], np.ndarray]
"""Draws the client of every image, ``[n] int``, from the labels ``[n] int64``, the section and a generator."""


def own_partition(name: str) -> Partition:
    """Return a partition of the user's own, whose every result is checked.

    Args:
        name: ``package.module:function``.

    Raises:
        UserError: it cannot be imported, or is not a function.
    """
    function = load_attribute("partition.kind", name)
    needed = "must be a function (labels, section, rng) -> the client of every image"
    if not callable(function):
        raise UserError("partition.kind", name, needed)

    def draw(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
        try:
            owner = np.asarray(function(labels, section, rng))
        except Exception as error:  # code that is not ours may raise anything
            fix = f"failed ({type(error).__name__}: {reason_of(error)}); {needed}"
            raise UserError("partition.kind", name, fix) from error
        if owner.shape != labels.shape or not np.issubdtype(owner.dtype, np.integer):
            fix = f"must return one integer per image, [{len(labels)}], and returned {list(owner.shape)} {owner.dtype}"
            raise UserError("partition.kind", name, fix)
        if owner.min() < 0 or owner.max() >= section.num_clients:
            raise UserError("partition.kind", name, f"returned clients outside 0..{section.num_clients - 1}")
        return owner.astype(int)

    return draw


def _iid(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
    """Assign images at random, in equal numbers."""
    return rng.permutation(len(labels)) % section.num_clients


def _dirichlet(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
    """Divide each class in proportions from Dir(alpha): the smaller alpha, the more skewed (Hsu et al. 2019).

    A client that already holds n / K images gets no more, as in CalFAT.
    CalFAT sets the proportions of full clients to zero and renormalises. Drawing for the other clients alone has the
    same distribution, as a Dirichlet is neutral, and cannot end in 0 / 0 at a small alpha.
    """
    clients = section.num_clients
    owner = np.empty(len(labels), int)
    held = np.zeros(clients, int)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        not_full = np.flatnonzero(held < len(labels) / clients)
        proportions = rng.dirichlet(np.full(len(not_full), min(section.alpha, MAX_ALPHA)))
        counts = largest_remainder(proportions, len(indices))
        owner[indices] = np.repeat(not_full, counts)
        held[not_full] += counts
    return owner


def _pathological(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
    """Give every client ``classes_per_client`` classes (McMahan et al. 2017), each class to about equally many clients.

    Where the clients together hold fewer classes than the data has, the remaining classes go to clients in turn.
    """
    clients, per_client = section.num_clients, section.classes_per_client
    classes = np.unique(labels)
    holders: dict[int, list[int]] = {int(c): [] for c in classes}
    for client in rng.permutation(clients).tolist():
        tie = rng.permutation(len(classes))
        order = sorted(range(len(classes)), key=lambda c: (len(holders[int(classes[c])]), tie[c]))
        for c in order[:per_client]:
            holders[int(classes[c])].append(client)
    for client, unheld in enumerate(label for label, held_by in holders.items() if not held_by):
        holders[unheld].append(client % clients)
    owner = np.empty(len(labels), int)
    for label, held_by in holders.items():
        indices = rng.permutation(np.flatnonzero(labels == label))
        owner[indices] = np.array(held_by)[np.arange(len(indices)) % len(held_by)]
    return owner


def _quantity(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
    """Give clients unequal numbers of images, in proportions from Dir(alpha), whatever the labels (Li et al. 2022)."""
    proportions = rng.dirichlet(np.full(section.num_clients, min(section.alpha, MAX_ALPHA)))
    counts = largest_remainder(proportions, len(labels))
    return rng.permutation(np.repeat(np.arange(section.num_clients), counts))


PARTITIONS: dict[str, Partition] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "quantity": _quantity,
}


def _with_minimum(owner: np.ndarray, kinds: np.ndarray, clients: int, minimum: int, order: np.ndarray) -> np.ndarray:
    """Move images, one by one, from the largest clients to clients below the minimum.

    On ties the client of the lowest number comes first. To keep the skew, a client gets classes that it already holds
    as long as another client can spare one. A client without images starts with the most frequent class of the donor.

    Args:
        owner: ``[n] int``, the client of each image.
        kinds: ``[n] int``, the class of each image, or zeros if classes do not matter.
        clients: number of clients.
        minimum: images that every client must have.
        order: a permutation; of several images that could be moved, the first in it is. Data sets are often sorted by
            class.

    Returns:
        The new owners, ``[n] int``.
    """
    owner = owner.copy()
    held = np.zeros((clients, int(kinds.max()) + 1), int)
    np.add.at(held, (owner, kinds), 1)
    while (sizes := held.sum(axis=1)).min() < minimum:
        receiver, spare = int(sizes.argmin()), np.maximum(sizes - minimum, 0)
        wanted = (held[receiver] > 0) & (held[spare > 0] > 0).any(axis=0)
        if not wanted.any():
            wanted[:] = True
        donor = int((spare * (held[:, wanted] > 0).any(axis=1)).argmax())
        kind = int((held[donor] * wanted).argmax())
        owner[order[(owner[order] == donor) & (kinds[order] == kind)][0]] = receiver
        held[donor, kind] -= 1
        held[receiver, kind] += 1
    return owner


def largest_remainder(proportions: np.ndarray, total: int) -> np.ndarray:
    """Divide ``total`` into whole numbers in given proportions, by Hamilton's method.

    Args:
        proportions: non-negative, of sum 1.
        total: sum of the result.

    >>> largest_remainder(np.array([0.5, 0.3, 0.2]), 4).tolist()
    [2, 1, 1]
    """
    exact = proportions * total
    counts = np.floor(exact + 1e-9).astype(int)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    return counts

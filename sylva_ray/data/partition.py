"""Dealing images to clients: IID, label skew (Dirichlet, pathological), quantity skew.

Every kind covers every image exactly once, keeps a guaranteed minimum, and ends: at most `MAX_DRAWS` draws, after which
images move from the largest clients until each has its minimum.
"""

from __future__ import annotations

import numpy as np

from sylva_ray.config.experiment import PartitionSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.seeding import numpy_generator

MAX_DRAWS = 20
MAX_ALPHA = 1e6
"""Larger concentrations give the same shares to a thousandth, and infinity has no sampler."""


def partition_labels(labels: np.ndarray, section: PartitionSection, seed: int) -> list[np.ndarray]:
    """Sorted, disjoint index arrays, one per client, that together cover ``labels [n]``.

    Raises:
        UserError: more clients than the images can serve; more classes per client than there are.
    """
    n, clients, minimum = len(labels), section.num_clients, section.min_samples
    if clients * minimum > n:
        fix = f"{n} training images cannot give each client {minimum} (partition.min_samples); at most {n // minimum} clients"
        raise UserError("partition.num_clients", clients, fix)
    num_classes = len(np.unique(labels))
    if section.kind == "pathological" and section.classes_per_client > num_classes:
        raise UserError("partition.classes_per_client", section.classes_per_client, f"there are {num_classes} classes")
    rng = numpy_generator(seed, "partition")
    for _ in range(MAX_DRAWS):
        owner = _DRAWS[section.kind](labels, section, rng)
        if np.bincount(owner, minlength=clients).min() >= minimum:
            break
    # Under quantity skew labels stay iid: there any image is as good as another.
    kinds = np.zeros_like(labels) if section.kind == "quantity" else labels
    owner = _with_minimum(owner, kinds, clients, minimum, rng.permutation(n))
    return [np.flatnonzero(owner == client) for client in range(clients)]


def _iid(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
    """Equal sizes, images at random."""
    return rng.permutation(len(labels)) % section.num_clients


def _dirichlet(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
    """Per class, shares ~ Dir(alpha) (Hsu et al. 2019); a client that already holds n / K images gets no more (CalFAT).

    CalFAT zeroes the shares of full clients and renormalises. Drawing for the open ones alone has the same distribution (a
    Dirichlet is neutral) and cannot end in 0 / 0 at a small alpha."""
    clients = section.num_clients
    owner = np.empty(len(labels), int)
    held = np.zeros(clients, int)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        below_share = np.flatnonzero(held < len(labels) / clients)
        shares = rng.dirichlet(np.full(len(below_share), min(section.alpha, MAX_ALPHA)))
        counts = largest_remainder(shares, len(indices))
        owner[indices] = np.repeat(below_share, counts)
        held[below_share] += counts
    return owner


def _pathological(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
    """``classes_per_client`` classes each (McMahan et al. 2017), classes used as evenly as possible.

    With fewer slots than classes, the classes left over go to clients in turn: every image has an owner."""
    clients, per_client = section.num_clients, section.classes_per_client
    classes = np.unique(labels)
    holders: dict[int, list[int]] = {int(c): [] for c in classes}
    for client in rng.permutation(clients).tolist():
        tie = rng.permutation(len(classes))
        order = sorted(range(len(classes)), key=lambda c: (len(holders[int(classes[c])]), tie[c]))
        for c in order[:per_client]:
            holders[int(classes[c])].append(client)
    for turn, unheld in enumerate(c for c, own in holders.items() if not own):
        holders[unheld].append(turn % clients)
    owner = np.empty(len(labels), int)
    for label, own in holders.items():
        indices = rng.permutation(np.flatnonzero(labels == label))
        owner[indices] = np.array(own)[np.arange(len(indices)) % len(own)]
    return owner


def _quantity(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
    """Sizes ~ Dir(alpha), labels as they come (Li et al. 2022)."""
    shares = rng.dirichlet(np.full(section.num_clients, min(section.alpha, MAX_ALPHA)))
    counts = largest_remainder(shares, len(labels))
    return rng.permutation(np.repeat(np.arange(section.num_clients), counts))


_DRAWS = {"iid": _iid, "dirichlet": _dirichlet, "pathological": _pathological, "quantity": _quantity}


def _with_minimum(owner: np.ndarray, kinds: np.ndarray, clients: int, minimum: int, order: np.ndarray) -> np.ndarray:
    """Move images, one by one, from whoever has most to whoever is short (both: lowest number first on ties).

    To keep the skew, a taker gets classes (``kinds [n]``) that it already holds as long as somebody can spare one, and one
    that holds nothing starts with the giver's most frequent class. Which images go is said by ``order``, a permutation: data
    sets are often sorted by class."""
    owner = owner.copy()
    held = np.zeros((clients, int(kinds.max()) + 1), int)
    np.add.at(held, (owner, kinds), 1)
    while (sizes := held.sum(axis=1)).min() < minimum:
        taker, spare = int(sizes.argmin()), np.maximum(sizes - minimum, 0)
        wanted = (held[taker] > 0) & (held[spare > 0] > 0).any(axis=0)
        if not wanted.any():
            wanted[:] = True
        giver = int((spare * (held[:, wanted] > 0).any(axis=1)).argmax())
        kind = int((held[giver] * wanted).argmax())
        owner[order[(owner[order] == giver) & (kinds[order] == kind)][0]] = taker
        held[giver, kind] -= 1
        held[taker, kind] += 1
    return owner


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in the proportions of ``shares`` (summing to 1) that sum to ``total`` exactly (Hamilton's method).

    >>> largest_remainder(np.array([0.5, 0.3, 0.2]), 4).tolist()
    [2, 1, 1]
    """
    exact = shares * total
    counts = np.floor(exact + 1e-9).astype(int)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    return counts

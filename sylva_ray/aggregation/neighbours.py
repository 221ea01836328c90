"""Neighbourhoods of clients: the nearest ones by the weight updates that their adapters express.

The inner product of two clients is that of their weight updates, ``<i, j> = sum over modules s^2 <B_i A_i, B_j
A_j>_F``, computed from the factors as ``sum((B_i^T B_j) o (A_i A_j^T))`` without forming an update. It does not depend
on how a client factorises its update. Distances are those of updates normalised to unit length (cosine geometry), in
which the common factor s = alpha / r cancels: the functions here leave it out.

In a fleet of up to `MAX_GRAM_CLIENTS`, the eigenvectors of the K x K Gram matrix give coordinates, which scikit-learn's
ball tree (Omohundro 1989) searches. In a larger one, sketches give candidates, whose distances are then computed
exactly (`sylva_ray.aggregation.sketches`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from sylva_ray.aggregation.sketches import (
    adapted_modules,
    candidate_lists,
    listed_products,
    update_norms,
)
from sylva_ray.aggregation.threads import in_threads
from sylva_ray.core.types import ClientState

MAX_GRAM_CLIENTS = 300
"""Fleets up to this size are searched by their Gram matrix, whose eigenvectors cost O(K^3)."""

TIE = 1e-6
"""Distances closer than this are equal: a squared distance has a rounding error of 1e-16, its root one of 1e-8."""

SAME_COSINE = 1 - 1e-6
"""Updates with a larger cosine are equal, where it comes from products in single precision."""

GRAM_ROWS = 128
"""Rows of factors that `product_gram` multiplies at once: fewer are slower, more need more memory."""


@dataclass(frozen=True)
class NeighbourGraph:
    """The neighbourhood of every client.

    Attributes:
        members: ``[K, k] int``, each client's neighbours, itself included, in ascending order.
        weights: ``[K, k]``, the weights of the members; rows sum to 1.
    """

    members: np.ndarray
    weights: np.ndarray

    def matrix(self) -> np.ndarray:
        """Return the weights as a dense ``[K, K]`` matrix."""
        dense = np.zeros((len(self.members), len(self.members)))
        np.put_along_axis(dense, self.members, self.weights, axis=1)
        return dense

    def group_receivers(self, keys: Sequence[Hashable]) -> list[list[int]]:
        """Group the rows with bit-identical members and weights and equal ``keys [K]``: they can share one merge.

        Groups are in the order of their first rows.
        """
        groups: dict[Hashable, list[int]] = {}
        for row, key in enumerate(keys):
            groups.setdefault((self.members[row].tobytes(), self.weights[row].tobytes(), key), []).append(row)
        return list(groups.values())


def product_gram(states: Sequence[ClientState]) -> np.ndarray:
    """Return the ``[K, K]`` float64 inner products of the clients' weight updates, in O(r^2 d) per pair and module.

    The factors of all clients are stacked, so that the pairs of `GRAM_ROWS` / r clients are two matrix products. For
    1,000 clients this takes seconds instead of minutes.
    """
    size = len(states)
    upper = np.zeros((size, size))
    for summand in in_threads(lambda module: _module_gram(states, module), adapted_modules(states[0])):
        upper += summand  # in the order of the modules
    return np.asarray(np.triu(upper) + np.triu(upper, 1).T)


def _module_gram(states: Sequence[ClientState], module: str) -> np.ndarray:
    """Return one module's summand of `product_gram`; only entries on and above the diagonal are valid."""
    size = len(states)
    a = np.stack([state[f"{module}.lora_A"] for state in states], dtype=np.float64)
    b_t = np.stack([state[f"{module}.lora_B"].T for state in states], dtype=np.float64)
    rank = a.shape[1]
    a, b_t = a.reshape(size * rank, -1), b_t.reshape(size * rank, -1)
    upper, step = np.zeros((size, size)), max(1, GRAM_ROWS // rank)
    for i in range(0, size, step):
        rows, columns = slice(i * rank, (i + step) * rank), slice(i * rank, None)
        overlap = (b_t[rows] @ b_t[columns].T) * (a[rows] @ a[columns].T)  # [step r, (K - i) r]
        summed = overlap.reshape(-1, rank, overlap.shape[1]).sum(1)  # over r first, which is faster
        upper[i : i + step, i:] = summed.reshape(len(summed), size - i, rank).sum(-1)
    return upper


def unit_coordinates(gram: np.ndarray) -> np.ndarray:
    """Return ``[K, d]`` unit vectors whose inner products are the cosines of a Gram matrix; zero vectors stay zero."""
    norms = np.sqrt(np.clip(np.diag(gram), 0, None))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    values, vectors = np.linalg.eigh(gram * inverse[:, None] * inverse)
    return np.asarray(vectors * np.sqrt(np.clip(values, 0, None)))


def neighbourhood_size(num_clients: int, k: int | None = None) -> int:
    """Return k, the client itself included, at most K; None: ceil(sqrt K), but at least 2."""
    return min(num_clients, k if k is not None else max(2, math.ceil(math.sqrt(num_clients))))


def nearest_clients(states: Sequence[ClientState], num_samples: np.ndarray, k: int | None = None) -> NeighbourGraph:
    """Return the neighbourhoods of K clients by their adapters; see `neighbour_graph`.

    A client whose update is zero, such as one that has not been picked for any round, has no direction: its distance to
    others without an update is 0, and to all the rest 1. So those without an update are each other's neighbours, the
    lowest numbers first.

    Args:
        states: of the clients, or their adapters.
        num_samples: training images per client, ``[K]``.
        k: see `neighbourhood_size`.
    """
    size = len(states)
    if size <= MAX_GRAM_CLIENTS:
        return neighbour_graph(product_gram(states), num_samples, k)
    k = neighbourhood_size(size, k)
    norms = update_norms(states)
    moved, silent = np.flatnonzero(norms > 0), np.flatnonzero(norms == 0)
    near = [silent] * size
    distances = [np.zeros(len(silent))] * size
    if len(moved):
        found, apart = _distances_of_candidates([states[i] for i in moved.tolist()], norms[moved], num_candidates(k))
        for position, client in enumerate(moved):
            near[client] = np.append(moved[found[position]], silent[:k])
            distances[client] = np.append(apart[position], np.ones(len(silent[:k])))
    for client in silent:
        near[client] = np.append(np.union1d(silent[:k], client), moved[:k])
        distances[client] = np.repeat([0.0, 1.0], [len(near[client]) - len(moved[:k]), len(moved[:k])])
    rows = [_weighted(i, near[i], distances[i], num_samples, k) for i in range(size)]
    return NeighbourGraph(np.stack([members for members, _ in rows]), np.stack([weights for _, weights in rows]))


def num_candidates(k: int) -> int:
    """Return how many candidates are compared exactly for k neighbours."""
    return k + max(16, k // 4)


def _distances_of_candidates(
    states: Sequence[ClientState], norms: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return candidates for the neighbours of K clients with updates, and their exact distances, ``[K, count]``."""
    lists = candidate_lists(states, norms, min(count, len(states)))
    cosines = listed_products(states, lists) / (norms[:, None] * norms[lists])
    return lists, np.where(cosines > SAME_COSINE, 0, np.sqrt(np.clip(2 - 2 * cosines, 0, None)))


def neighbour_graph(gram: np.ndarray, num_samples: np.ndarray, k: int | None = None) -> NeighbourGraph:
    """Return the k nearest clients of every client, itself included, weighted by ``n_j exp(-d^2 / (2 sigma_i^2))``.

    sigma_i is the distance to the k-th neighbour (1 where that is 0). Of equal distances the lower client number is
    nearer. A client's own weight is at least 1/k.

    Args:
        gram: ``[K, K]`` from `product_gram`.
        num_samples: training images per client, ``[K]``.
        k: see `neighbourhood_size`.
    """
    from sklearn.neighbors import BallTree  # takes seconds to import; few processes need it

    size = len(gram)
    k = neighbourhood_size(size, k)
    points = unit_coordinates(gram)
    tree = BallTree(points)
    radii = tree.query(points, k=k)[0][:, -1]
    within = tree.query_radius(points, r=radii + TIE)
    members, weights = np.zeros((size, k), int), np.zeros((size, k))
    for i, (radius, near) in enumerate(zip(radii, within, strict=True)):
        distance = np.linalg.norm(points[near] - points[i], axis=1)
        members[i], weights[i] = _weighted(i, near, distance, num_samples, k, radius)
    return NeighbourGraph(members, weights)


def _weighted(
    client: int,
    near: np.ndarray,
    distance: np.ndarray,
    num_samples: np.ndarray,
    k: int,
    radius: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest of the clients ``near`` in ascending order, ``client`` among them, and their weights.

    Args:
        client: whose neighbourhood it is.
        near: at least k clients, ``client`` among them.
        distance: from ``client`` to each.
        num_samples: training images of all clients.
        k: how many neighbours.
        radius: the distance to the k-th; None: the largest of the distances to the k nearest.
    """
    order = np.lexsort((near, (distance / TIE).round(), near != client))[:k]  # itself, then by distance, then by number
    order = order[near[order].argsort()]
    chosen, d, is_self = near[order], distance[order], near[order] == client
    radius = float(d.max()) if radius is None else radius
    sigma = radius if radius > TIE else 1.0
    w = np.asarray(num_samples, np.float64)[chosen] * np.exp(-(d**2) / (2 * sigma**2))
    w /= w.sum()
    if w[is_self] < 1 / k:
        w = np.where(is_self, 1 / k, w * (1 - 1 / k) / max(w[~is_self].sum(), 1e-300))
    return chosen, w / w.sum()


def global_graph(num_samples: np.ndarray) -> NeighbourGraph:
    """Return the graph in which all clients are neighbours, weighted by images (FedAvg, McMahan et al. 2017)."""
    n = np.asarray(num_samples, np.float64)
    size = len(n)
    return NeighbourGraph(np.tile(np.arange(size), (size, 1)), np.tile(n / n.sum(), (size, 1)))

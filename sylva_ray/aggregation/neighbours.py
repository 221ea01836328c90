"""Neighbourhoods of clients: the nearest ones by the weight updates that their adapters express.

The inner product of two clients is that of their weight updates, ``<i, j> = sum over modules s^2 <B_i A_i, B_j
A_j>_F``, computed from the factors as ``sum((B_i^T B_j) o (A_i A_j^T))`` without forming an update. It does not depend
on how a client factorises its update. The eigenvectors of the K x K Gram matrix give coordinates, normalised to unit
length (cosine geometry), which scikit-learn's ball tree (Omohundro 1989) searches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sylva_ray.core.types import ClientState

TIE = 1e-6
"""Distances closer than this are equal: a squared distance has a rounding error of 1e-16, its root one of 1e-8."""

MERGING_THREADS = min(4, os.cpu_count() or 1)
"""Threads of the coordinator, whose workers wait meanwhile.

Every merge runs on one thread, so results do not depend on this number."""

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
    modules = [name.removesuffix(".lora_A") for name in states[0] if name.endswith(".lora_A")]
    upper = np.zeros((size, size))
    with ThreadPoolExecutor(MERGING_THREADS) as threads:
        for summand in threads.map(lambda module: _module_gram(states, module), modules):  # in the order of the modules
            upper += summand
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
        distance = (np.linalg.norm(points[near] - points[i], axis=1) / TIE).round()
        order = np.lexsort((near, distance, near != i))[:k]  # the client itself, then by distance, then by number
        chosen = np.sort(near[order])
        d = np.linalg.norm(points[chosen] - points[i], axis=1)
        sigma = radius if radius > TIE else 1.0
        w = np.asarray(num_samples, np.float64)[chosen] * np.exp(-(d**2) / (2 * sigma**2))
        w /= w.sum()
        is_self = chosen == i
        if w[is_self] < 1 / k:
            w = np.where(is_self, 1 / k, w * (1 - 1 / k) / max(w[~is_self].sum(), 1e-300))
        members[i], weights[i] = chosen, w / w.sum()
    return NeighbourGraph(members, weights)


def global_graph(num_samples: np.ndarray) -> NeighbourGraph:
    """Return the graph in which all clients are neighbours, weighted by images (FedAvg, McMahan et al. 2017)."""
    n = np.asarray(num_samples, np.float64)
    size = len(n)
    return NeighbourGraph(np.tile(np.arange(size), (size, 1)), np.tile(n / n.sum(), (size, 1)))

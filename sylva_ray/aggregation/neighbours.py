"""Who is averaged with whom: the nearest clients in a gauge-free geometry of their adapters.

The inner product of two clients is that of their weight updates, ``<i, j> = sum over modules s^2 <B_i A_i, B_j A_j>_F``, computed
from the factors as ``sum((B_i^T B_j) o (A_i A_j^T))`` without forming an update. The K x K Gram matrix's eigenvectors give
coordinates, normalised to unit length (cosine geometry), which scikit-learn's ball tree (Omohundro 1989) searches.
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
"""Distances closer than this are equal: a squared distance carries rounding of 1e-16, its root 1e-8."""

MERGING_THREADS = min(4, os.cpu_count() or 1)
"""Of the coordinator, whose workers wait meanwhile. A piece is one thread's work, so bits do not depend on their number."""

GRAM_ROWS = 128
"""Rows of factors that `product_gram` multiplies at once: a matrix product of fewer is slower, one of more needs memory."""


@dataclass(frozen=True)
class NeighbourGraph:
    """``members [K, k] int``: each client's neighbours with itself among them, sorted by client; ``weights [K, k]``, rows sum
    to 1."""

    members: np.ndarray
    weights: np.ndarray

    def matrix(self) -> np.ndarray:
        """The weights as ``[K, K]``."""
        dense = np.zeros((len(self.members), len(self.members)))
        np.put_along_axis(dense, self.members, self.weights, axis=1)
        return dense

    def group_receivers(self, own: Sequence[Hashable]) -> list[list[int]]:
        """Rows with equal members, equal weights and equal entries of ``own [K]``: one merge serves all of a group.

        Groups come in the order of their first rows; equal means equal bits."""
        groups: dict[Hashable, list[int]] = {}
        for row, key in enumerate(own):
            groups.setdefault((self.members[row].tobytes(), self.weights[row].tobytes(), key), []).append(row)
        return list(groups.values())


def product_gram(states: Sequence[ClientState], scaling: float = 1.0) -> np.ndarray:
    """``[K, K]`` float64 inner products of the clients' weight updates; O(r^2 d) per pair and module.

    The factors of all clients are stacked, so that the pairs of `GRAM_ROWS` / r clients are two matrix products: at 1,000
    clients this decides between seconds and minutes."""
    size = len(states)
    modules = [name.removesuffix(".lora_A") for name in states[0] if name.endswith(".lora_A")]
    upper = np.zeros((size, size))
    with ThreadPoolExecutor(MERGING_THREADS) as threads:
        for part in threads.map(lambda module: _module_gram(states, module), modules):  # summed in the modules' order
            upper += part
    return scaling**2 * (np.triu(upper) + np.triu(upper, 1).T)


def _module_gram(states: Sequence[ClientState], module: str) -> np.ndarray:
    """One module's part of `product_gram`; only entries on and above the diagonal count."""
    size = len(states)
    a = np.stack([state[f"{module}.lora_A"] for state in states], dtype=np.float64)
    b_t = np.stack([state[f"{module}.lora_B"].T for state in states], dtype=np.float64)
    rank = a.shape[1]
    a, b_t = a.reshape(size * rank, -1), b_t.reshape(size * rank, -1)
    upper, step = np.zeros((size, size)), max(1, GRAM_ROWS // rank)
    for i in range(0, size, step):
        own, onwards = slice(i * rank, (i + step) * rank), slice(i * rank, None)
        overlap = (b_t[own] @ b_t[onwards].T) * (a[own] @ a[onwards].T)  # [step r, (K - i) r]
        summed = overlap.reshape(-1, rank, overlap.shape[1]).sum(1)  # over r first: that is fast
        upper[i : i + step, i:] = summed.reshape(len(summed), size - i, rank).sum(-1)
    return upper


def unit_coordinates(gram: np.ndarray) -> np.ndarray:
    """``[K, d]`` points of unit length whose inner products are the Gram matrix's cosines (zero vectors stay zero)."""
    norms = np.sqrt(np.clip(np.diag(gram), 0, None))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    values, vectors = np.linalg.eigh(gram * inverse[:, None] * inverse)
    return vectors * np.sqrt(np.clip(values, 0, None))


def neighbourhood_size(num_clients: int, k: int | None = None) -> int:
    """k, oneself included; None: ceil(sqrt K), but at least 2. Never more than there are clients."""
    return min(num_clients, k if k is not None else max(2, math.ceil(math.sqrt(num_clients))))


def neighbour_graph(
    gram: np.ndarray,
    num_samples: np.ndarray,
    k: int | None = None,
    floor: bool = True,
    uniform: bool = False,
) -> NeighbourGraph:
    """The k nearest of every client (itself included), weighted by ``n_j exp(-d^2 / (2 sigma_i^2))``.

    Args:
        gram: ``[K, K]`` from `product_gram`.
        num_samples: training images per client, ``[K]``.
        k: see `neighbourhood_size`.
        floor: whether a client's own weight is at least 1/k.
        uniform: sigma infinite; with ``k = K`` and no floor this is FedAvg.

    sigma_i is the distance to the k-th neighbour (1 where that is 0). Equal distances are resolved by client number.
    """
    from sklearn.neighbors import BallTree  # seconds of importing, for the coordinator of some methods

    size = len(gram)
    k = neighbourhood_size(size, k)
    points = unit_coordinates(gram)
    tree = BallTree(points)
    radii = tree.query(points, k=k)[0][:, -1]
    within = tree.query_radius(points, r=radii + TIE)
    members, weights = np.zeros((size, k), int), np.zeros((size, k))
    for i, (radius, near) in enumerate(zip(radii, within, strict=True)):
        distance = (np.linalg.norm(points[near] - points[i], axis=1) / TIE).round()
        order = np.lexsort((near, distance, near != i))[:k]  # oneself first, then by distance, then by number
        chosen = np.sort(near[order])
        d = np.linalg.norm(points[chosen] - points[i], axis=1)
        sigma = np.inf if uniform else (radius if radius > TIE else 1.0)
        w = np.asarray(num_samples, np.float64)[chosen] * np.exp(-(d**2) / (2 * sigma**2))
        w /= w.sum()
        own = chosen == i
        if floor and w[own] < 1 / k:
            w = np.where(own, 1 / k, w * (1 - 1 / k) / max(w[~own].sum(), 1e-300))
        members[i], weights[i] = chosen, w / w.sum()
    return NeighbourGraph(members, weights)


def global_graph(num_samples: np.ndarray) -> NeighbourGraph:
    """Everybody with everybody, weighted by images (FedAvg, McMahan et al. 2017)."""
    n = np.asarray(num_samples, np.float64)
    size = len(n)
    return NeighbourGraph(np.tile(np.arange(size), (size, 1)), np.tile(n / n.sum(), (size, 1)))

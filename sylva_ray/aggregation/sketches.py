"""Candidates for the neighbours of a client in a large fleet, from random sketches of weight updates.

The update P = B A of a module is sketched as ``U^T P V [s, s]`` with fixed normal matrices U and V, which costs
O(r s (d_out + d_in)). Squared distances between sketches are those between updates in expectation (Johnson and
Lindenstrauss 1984), so all K^2 of them are one product of a ``[K, modules s^2]`` matrix. The nearest by sketches are
candidates: their distances are then computed exactly, in O(r^2 d) for each pair and module.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sylva_ray.aggregation.threads import in_threads
from sylva_ray.core.types import ClientState

SKETCH_SIZE = 4096
"""Numbers in the sketch of a client, about: distances between neighbours are then off by a few per cent."""

ROWS = 512
"""Clients whose distances to all others are computed at once."""

PARTNERS = 64
"""Clients whose factors are copied side by side for their products with another's: more leave the cache."""


def candidate_lists(states: Sequence[ClientState], norms: np.ndarray, count: int) -> np.ndarray:
    """Return the clients that are nearest by sketches of their normalised updates.

    Args:
        states: of K clients.
        norms: of their updates, ``[K]``, from `update_norms`.
        count: how many to return for each, the client itself included; at most K.

    Returns:
        ``[K, count]`` client numbers in ascending order.
    """
    points = _sketches(states) * np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)[:, None]
    points = (points - points.mean(0)).astype(np.float32)  # distances stay, and rounding errors become small
    squares = np.einsum("ij,ij->i", points, points)

    def nearest(first: int) -> np.ndarray:
        rows = points[first : first + ROWS]
        distance = squares - 2 * (rows @ points.T)  # up to the square of the row's own norm
        distance[np.arange(len(rows)), first + np.arange(len(rows))] = -np.inf
        return np.asarray(np.sort(np.argpartition(distance, count - 1, axis=1)[:, :count], axis=1))

    return np.concatenate(in_threads(nearest, range(0, len(states), ROWS)))


def update_norms(states: Sequence[ClientState]) -> np.ndarray:
    """Return the Frobenius norms of the clients' weight updates, over all modules, ``[K] float64``."""

    def square(state: ClientState) -> float:
        factors = [(state[f"{m}.lora_B"].astype(np.float64), state[f"{m}.lora_A"].astype(np.float64)) for m in modules]
        return sum(float(((b.T @ b) * (a @ a.T)).sum()) for b, a in factors)

    modules = adapted_modules(states[0])
    return np.asarray(np.sqrt(np.clip(in_threads(square, states), 0, None)))


def listed_products(states: Sequence[ClientState], lists: np.ndarray) -> np.ndarray:
    """Return the inner products of every client's update with those of the clients in its list.

    Factors are multiplied in their own precision, all else is summed in float64: cosines are exact to about 1e-7.

    Args:
        states: of K clients.
        lists: ``[K, c]`` client numbers in ascending order.

    Returns:
        ``[K, c]`` float64.
    """
    size, count = lists.shape
    first = np.repeat(np.arange(size), count)
    pairs, place = np.unique(
        np.minimum(first, lists.ravel()) * size + np.maximum(first, lists.ravel()), return_inverse=True
    )
    starts = np.searchsorted(pairs // size, np.arange(size + 1))
    partners = pairs % size

    def of_module(module: str) -> np.ndarray:
        a = np.stack([state[f"{module}.lora_A"] for state in states])
        b_t = np.ascontiguousarray(np.stack([state[f"{module}.lora_B"] for state in states]).mT)
        products = np.empty(len(pairs))
        rows_b, rows_a = (np.empty((PARTNERS, *factor.shape[1:]), factor.dtype) for factor in (b_t, a))
        for client in range(size):
            for start in range(starts[client], starts[client + 1], PARTNERS):
                some = slice(start, min(start + PARTNERS, starts[client + 1]))
                of_b, of_a = (_overlaps(x, partners[some], client, rows) for x, rows in ((b_t, rows_b), (a, rows_a)))
                products[some] = np.einsum("pi,pi->p", of_b.astype(np.float64), of_a)
        return products

    total = np.zeros(len(pairs))
    for summand in in_threads(of_module, adapted_modules(states[0])):  # in the order of the modules
        total += summand
    return np.asarray(total[place.ravel()].reshape(size, count))


def _overlaps(factors: np.ndarray, clients: np.ndarray, client: int, rows: np.ndarray) -> np.ndarray:
    """Return ``factors[j] @ factors[client].T`` for all j of ``clients``, flattened: ``[len(clients), r r]``.

    Args:
        factors: ``[K, r, d]``.
        clients: positions j.
        client: the other position.
        rows: is overwritten, ``[at least len(clients), r, d]``: megabytes that are allocated anew cost page faults.
    """
    rows = rows[: len(clients)]
    np.take(factors, clients, 0, out=rows, mode="clip")
    return np.asarray((rows.reshape(-1, rows.shape[2]) @ factors[client].T).reshape(len(clients), -1))


def adapted_modules(state: ClientState) -> list[str]:
    """Return the modules of which ``state`` has a factor A, in its order."""
    return [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]


def _sketches(states: Sequence[ClientState]) -> np.ndarray:
    """Return ``[K, modules s^2]`` float32."""
    modules = adapted_modules(states[0])
    side = int(np.clip(np.sqrt(SKETCH_SIZE / max(1, len(modules))), 4, 24))
    directions = []
    for index, module in enumerate(modules):
        rng = np.random.default_rng(index)
        d_out, d_in = len(states[0][f"{module}.lora_B"]), states[0][f"{module}.lora_A"].shape[1]
        directions.append(tuple(rng.normal(size=(d, side)).astype(np.float32) / np.sqrt(side) for d in (d_out, d_in)))

    def of_client(state: ClientState) -> np.ndarray:
        parts = [
            (u.T @ state[f"{module}.lora_B"]) @ (state[f"{module}.lora_A"] @ v)
            for module, (u, v) in zip(modules, directions, strict=True)
        ]
        return np.stack(parts).astype(np.float32).ravel()

    return np.stack(in_threads(of_client, states))

"""Merges for many receivers of the same uploads, by subspace iteration in single precision.

A large fleet is merged module by module. The factors of all clients are packed side by side once, so that a
neighbourhood's are a selection of rows, and they are multiplied once with directions V that the fleet has in common: a
receiver's first product, ``M V = sum_j w_j B_j (A_j V)``, then needs one factor only.

A receiver's iteration multiplies by M and by its transpose in turn, on blocks of 2 r vectors (Halko, Martinsson and
Tropp 2011). Every half step gives Ritz triplets, and the next one their residuals. It ends when these bound the error.
What does not converge, and merges of few columns, are left to `sylva_ray.aggregation.factors.merge_factors`.

What a receiver gets depends on the uploads and on its own merge, not on the receivers that are computed with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sylva_ray.aggregation.factors import factors_of_triplets, merge_factors, paired_modules
from sylva_ray.aggregation.low_rank import CANCELLATION, MAX_DIRECT_ORDER, SINGLE_ERROR, TINY, Triplets
from sylva_ray.aggregation.threads import in_threads
from sylva_ray.core.types import ClientState

MIN_COLUMNS = 128
"""Neighbours times rank of the smallest merge that is computed here."""

MAX_HALF_STEPS = 8
"""Multiplications by M or its transpose after the first two."""

SMALLEST_VALUE = 1e-5
"""Products whose r-th singular value is a smaller fraction of the largest are left to double precision."""

MAX_HEARD = 256
"""How many clients decide the common directions."""

NORMS = (1e-6, 1e6)
"""Clients with factors outside these norms play no part in the choice of the common directions."""

COLUMNS = 3072
"""Neighbours times rank of all receivers that are computed side by side: more leave the cache, fewer cost calls."""

Each: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]
"""Applies a function to every item, as `sylva_ray.aggregation.threads.in_threads` does."""


@dataclass(frozen=True)
class Mixture:
    """A merge for one receiver.

    Attributes:
        members: positions of the states that are merged.
        weights: one per member; they sum to 1.
        receiver: position of the state that the result is for.
    """

    members: np.ndarray
    weights: np.ndarray
    receiver: int


@dataclass(frozen=True)
class PackedModule:
    """One module's factors of K clients in single precision.

    Attributes:
        b: ``[K, r, d_out]``, transposed, so that a neighbourhood's columns are rows that lie together.
        a: ``[K, r, d_in]``.
        start: ``[K, r, 2 r]``, A times directions that the fleet has in common.
        norms_b: Frobenius norms of B, ``[K]``.
        norms_a: Frobenius norms of A, ``[K]``.
    """

    b: np.ndarray
    a: np.ndarray
    start: np.ndarray
    norms_b: np.ndarray
    norms_a: np.ndarray


def merge_for_receivers(
    states: Sequence[ClientState], mixtures: Sequence[Mixture], each: Each = in_threads
) -> list[dict[str, np.ndarray]]:
    """Merge by the rule ``product_svd`` for every receiver.

    Args:
        states: the uploads of the round, all of them wherever this runs: they decide the common directions.
        mixtures: the merges.
        each: runs the pieces of work, each on one thread.

    Returns:
        For each mixture what `merge_factors` returns, up to an error of `SINGLE_ERROR` of the largest singular value in
        the products of `long_modules`.
    """
    long = {size: long_modules(states[0], size) for size in {len(mixture.members) for mixture in mixtures}}

    def merge_rest(mixture: Mixture) -> dict[str, np.ndarray]:
        factors = {f"{module}.lora_{letter}" for module in long[len(mixture.members)] for letter in "AB"}
        return _merge_directly(states, mixture, [name for name in states[0] if name not in factors])

    merged = each(merge_rest, mixtures)
    for module in dict.fromkeys(module for modules in long.values() for module in modules):
        packed = pack(states, module)
        places = [place for place, mixture in enumerate(mixtures) if module in long[len(mixture.members)]]

        def merge_some(places: list[int], module: str = module, packed: PackedModule = packed) -> None:
            factors = _merge_module(states, packed, module, [mixtures[place] for place in places])
            for place, pair in zip(places, factors, strict=True):
                merged[place] |= pair

        columns = [int(np.count_nonzero(mixtures[place].weights)) * packed.a.shape[1] for place in places]
        each(merge_some, _batches(places, columns))
    return merged


def _batches(places: Sequence[int], columns: Sequence[int]) -> list[list[int]]:
    """Divide ``places`` into batches of equal ``columns``, of up to `COLUMNS` in all if that is more than one place."""
    of_size: dict[int, list[int]] = {}
    for place, size in zip(places, columns, strict=True):
        of_size.setdefault(size, []).append(place)
    batches = []
    for size, group in of_size.items():
        width = max(1, COLUMNS // max(1, size))
        batches += [group[first : first + width] for first in range(0, len(group), width)]
    return batches


def long_modules(state: ClientState, num_members: int) -> list[str]:
    """Return the modules of ``state`` of which so many members are merged here, not by `merge_factors`."""
    modules = []
    for module in paired_modules(state):
        a, b = state[f"{module}.lora_A"], state[f"{module}.lora_B"]
        is_wide = min(a.shape[1], len(b)) > max(MAX_DIRECT_ORDER, 4 * len(a))
        if is_wide and num_members * len(a) >= MIN_COLUMNS and a.dtype == b.dtype == np.float32:
            modules.append(module)
    return modules


def pack(states: Sequence[ClientState], module: str) -> PackedModule:
    """Pack the factors of one module."""
    a = np.stack([state[f"{module}.lora_A"] for state in states])
    b = np.ascontiguousarray(np.stack([state[f"{module}.lora_B"] for state in states]).mT)
    size, rank, d_in = a.shape
    with np.errstate(invalid="ignore", over="ignore"):  # a client with huge factors is left out of the directions
        norms_b, norms_a = (np.sqrt(np.einsum("ki,ki->k", x, x)) for x in (b.reshape(size, -1), a.reshape(size, -1)))
        directions = common_directions(b, a, norms_b, norms_a)
        start = (a.reshape(-1, d_in) @ directions).reshape(size, rank, -1)
    return PackedModule(b, a, start, norms_b, norms_a)


def common_directions(b: np.ndarray, a: np.ndarray, norms_b: np.ndarray, norms_a: np.ndarray) -> np.ndarray:
    """Return orthonormal columns ``[d_in, 2 r]`` near the leading right singular space of the clients' products.

    Three steps of subspace iteration on ``sum_j P_j^T P_j``, where ``P_j = B_j A_j`` over the norms of its factors, for
    `MAX_HEARD` clients j that are spread over the fleet. The sum does not depend on signs and rotations within the
    factors, as the mean of the products would.

    Args:
        b: ``[K, r, d_out]``, transposed.
        a: ``[K, r, d_in]``.
        norms_b: ``[K]``.
        norms_a: ``[K]``.
    """
    usual = (min(NORMS) < norms_b) & (norms_b < max(NORMS)) & (min(NORMS) < norms_a) & (norms_a < max(NORMS))
    heard = np.flatnonzero(usual)
    heard = heard[:: max(1, math.ceil(len(heard) / MAX_HEARD))]
    weights = (b[heard] @ b[heard].mT) / np.square(norms_b[heard] * norms_a[heard])[:, None, None]
    rows = a[heard].reshape(-1, a.shape[-1])
    x: np.ndarray = np.random.default_rng(0).normal(size=(a.shape[-1], 2 * a.shape[1])).astype(np.float32)
    for _ in range(3):
        images = weights @ (rows @ x).reshape(*weights.shape[:2], x.shape[1])
        x = np.linalg.qr((rows.T @ images.reshape(-1, x.shape[1])).astype(np.float64))[0].astype(np.float32)
    return x


def leading_of_mixtures(
    packed: PackedModule, members: np.ndarray, weights: np.ndarray, rank: int
) -> tuple[Triplets, np.ndarray]:
    """Return the leading singular triplets of ``M_i = sum_j w_ij B_j A_j`` for R receivers i.

    Args:
        packed: the module.
        members: the clients j of each, ``[R, k]``.
        weights: ``[R, k]``.
        rank: how many triplets.

    Returns:
        ``u [R, d_out, rank]``, ``s [R, rank]``, ``vt [R, rank, d_in]``, float64, and whether their product is within
        `SINGLE_ERROR` of the best one, ``[R] bool``; where it is not, they have no meaning.
    """
    scale = _norm(packed.norms_b[members]) * _norm(weights * packed.norms_a[members])
    is_usable = (scale > TINY) & (scale < np.inf)
    found, is_open = np.zeros(len(members), bool), np.ones(len(members), bool)
    u = np.empty((len(members), packed.b.shape[-1], rank))
    s, vt = np.empty((len(members), rank)), np.empty((len(members), rank, packed.a.shape[-1]))
    if not is_usable.all():
        if is_usable.any():
            parts, found[is_usable] = leading_of_mixtures(packed, members[is_usable], weights[is_usable], rank)
            u[is_usable], s[is_usable], vt[is_usable] = parts
        return (u, s, vt), found
    b, a, start = (
        x.take(members, 0).reshape(len(members), -1, x.shape[-1]) for x in (packed.b, packed.a, packed.start)
    )
    w = np.repeat((weights / scale[:, None]).astype(np.float32), packed.b.shape[1], axis=1)[..., None]
    x = _orthonormal(a.mT @ (w * (b @ (b.mT @ (w * start)))))
    near, far = b, a
    y = b.mT @ (w * (a @ x))
    for num_left in reversed(range(MAX_HALF_STEPS)):
        values, rotation = _ritz(y)
        largest, smallest = values[:, 0], values[:, rank - 1]
        inverse = np.divide(1.0, values, out=np.zeros_like(values), where=values > SMALLEST_VALUE * largest[:, None])
        previous = (x @ rotation[..., :rank].astype(np.float32)) * values[:, None, :rank].astype(np.float32)
        x = y @ (rotation * inverse[:, None]).astype(np.float32)
        near, far = far, near
        y = near.mT @ (w * (far @ x))
        is_safe = (w.shape[1] * np.square(values).sum(-1) > CANCELLATION) & (smallest > SMALLEST_VALUE * largest)
        bound = _error_bound(values, y[..., :rank] - previous)
        is_new = is_safe & (bound <= SINGLE_ERROR / 2 * largest) & is_open
        if is_new.any():
            s_new, turn = _ritz(y[is_new, :, :rank])
            turn_ahead = turn * np.divide(1.0, s_new, out=np.zeros_like(s_new), where=s_new > TINY)[:, None]
            ahead = y[is_new, :, :rank].astype(np.float64) @ turn_ahead
            behind = x[is_new, :, :rank].astype(np.float64) @ turn
            u[is_new], v = (ahead, behind) if near is b else (behind, ahead)
            s[is_new], vt[is_new] = s_new * scale[is_new, None], v.mT
            found |= is_new
        fall = np.divide(values[:, -1], smallest, out=np.ones_like(smallest), where=smallest > 0)
        # a receiver without hope stays so: what it gets must not depend on how long others of its batch take
        is_open &= is_safe & ~found & (bound * fall**num_left <= SINGLE_ERROR / 2 * largest)
        if not is_open.any():
            break
    return (u, s, vt), found


def _merge_module(
    states: Sequence[ClientState], packed: PackedModule, module: str, mixtures: Sequence[Mixture]
) -> list[dict[str, np.ndarray]]:
    """Return both merged factors of one module for receivers with equally many members of positive weight."""
    names = [f"{module}.lora_{letter}" for letter in "AB"]
    heard = [mixture.weights != 0 for mixture in mixtures]
    members = np.stack([mixture.members[is_heard] for mixture, is_heard in zip(mixtures, heard, strict=True)])
    weights = np.stack([mixture.weights[is_heard] for mixture, is_heard in zip(mixtures, heard, strict=True)])
    anchor_a = np.stack([states[mixture.receiver][names[0]] for mixture in mixtures])
    triplets, found = leading_of_mixtures(packed, members, weights, anchor_a.shape[1])
    found &= (packed.norms_b[members] != packed.norms_b[members[:, :1]]).any(-1)  # equal states keep their bits
    b, a = factors_of_triplets(anchor_a, *triplets)
    return [
        dict(zip(names, (a[i].copy(), b[i].copy()), strict=True))
        if found[i]
        else _merge_directly(states, mixture, names)
        for i, mixture in enumerate(mixtures)
    ]


def _merge_directly(states: Sequence[ClientState], mixture: Mixture, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Merge the parameters ``names`` for one receiver by `merge_factors`."""
    if not names:
        return {}
    anchor, *parts = ({name: states[i][name] for name in names} for i in (mixture.receiver, *mixture.members.tolist()))
    return merge_factors(anchor, parts, mixture.weights, "product_svd")


def _orthonormal(y: np.ndarray) -> np.ndarray:
    """Return orthonormal bases of the columns of ``y [R, d, c]`` in single precision, by Cholesky QR.

    A small shift lets dependent columns be factorised; what is left of them is zero or noise.
    """
    wide = y.astype(np.float64)
    gram = wide.mT @ wide
    squares = np.diagonal(gram, axis1=-2, axis2=-1)
    inverse = np.divide(1.0, np.sqrt(squares), out=np.zeros(squares.shape), where=squares > TINY)
    root = np.linalg.cholesky(gram * inverse[:, None] * inverse[..., None] + 1e-12 * np.eye(y.shape[-1]))
    return np.asarray((wide @ (inverse[..., None] * np.linalg.inv(root).mT)).astype(np.float32))


def _ritz(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the singular values of ``y [R, d, c]`` in descending order, and its right singular vectors.

    They come from the Gram matrix.
    """
    wide = y.astype(np.float64)
    values, rotation = np.linalg.eigh(wide.mT @ wide)
    return np.sqrt(values[:, ::-1].clip(0)), rotation[..., ::-1].copy()


def _error_bound(s: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Return how far the rank-r product of vectors one multiplication ahead of Ritz triplets is from the best, ``[R]``.

    Mixing direction j <= r with m > r by an angle t changes the product by ``t sqrt(s_j^2 + s_m^2)``, and a residual e
    of ``M M^T x - s_j^2 x`` leaves ``t = e / (s_j^2 - s_m^2)``; so the change is at most ``sqrt(2) e / (s_j - s_m)``. A
    multiplication reduces it by s_m / s_j.

    Args:
        s: ``[R, 2 r]`` Ritz values in descending order.
        residual: ``[R, d, r]``, of M or its transpose.
    """
    rank = residual.shape[-1]
    first, next_one = s[:, :rank], s[:, rank, None]
    gap = first - next_one
    is_apart = (gap > 0).all(-1)
    errors = np.sqrt(2) * np.divide(_norm(residual.mT) * next_one, gap, out=np.zeros_like(gap), where=gap > 0)
    return np.where(is_apart, _norm(errors), np.inf)


def _norm(rows: np.ndarray) -> np.ndarray:
    """Return the Euclidean norms along the last axis, float64; the bits of one do not depend on the others."""
    rows = np.ascontiguousarray(rows, np.float64)[..., None]
    return np.asarray(np.sqrt((rows.mT @ rows)[..., 0, 0]))

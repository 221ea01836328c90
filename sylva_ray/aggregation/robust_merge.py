"""Robust rules on client states: the Gram matrix of the models decides the weights, `merge_factors` does the sum.

A rule that returns a combination of its inputs acts on products B A (no gauge); the coordinate rules need arrays whose entries
mean the same for every client, which the method's parameters check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sylva_ray.aggregation.factors import merge_factors, paired_modules
from sylva_ray.aggregation.neighbours import product_gram
from sylva_ray.aggregation.robust import (
    COORDINATE_RULES,
    buckets,
    combination,
    coordinate_median,
    self_centred,
    trimmed_mean,
)
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import ClientState


def robust_merge(
    anchor: ClientState,
    origin: ClientState,
    states: Sequence[ClientState],
    weights: np.ndarray,
    own: int,
    factor_rule: str,
    rule: str,
    num_byzantine: int,
    bucket_size: int = 1,
    frozen: Mapping[str, np.ndarray] | None = None,
    draw: tuple[int, int] = (0, 0),
) -> dict[str, np.ndarray]:
    """Merge ``states`` by a robust ``rule`` for the client that received ``origin`` and sent ``anchor``.

    Args:
        weights: of the neighbourhood; only self-centred clipping uses them (a client could lie about its images).
        own: the receiver's place among ``states``.
        num_byzantine: how many of the states may be forged.
        bucket_size: states averaged at random before the rule (1: none); not with self-centred clipping.
        frozen: factors that do not travel and are the same for all (LoRA-FA's A): distances are those of the products.
        draw: (seed, round) of the buckets.
    """
    rng = numpy_generator(draw[0], "buckets", round=draw[1])
    averaging = buckets(len(states), bucket_size if rule != "self_centred_clipping" else 1, rng)
    if rule in COORDINATE_RULES:
        return {
            name: _coordinates(
                rule, origin[name], np.stack([state[name] for state in states]), averaging, num_byzantine
            )
            for name in anchor
        }
    gram = state_gram([{**(frozen or {}), **state} for state in (*states, origin)], anchor)
    updates = gram[:-1, :-1] - gram[:-1, -1:] - gram[-1:, :-1] + gram[-1, -1]
    if rule == "self_centred_clipping":
        coefficients = self_centred(updates, weights, own)
    else:
        coefficients = combination(rule, averaging @ updates @ averaging.T, num_byzantine) @ averaging
    return merge_factors(anchor, [*states, origin], [*coefficients, 1 - coefficients.sum()], factor_rule)


def state_gram(states: Sequence[ClientState], like: ClientState) -> np.ndarray:
    """``[n, n]`` inner products: of the LoRA products, plus those of the plain arrays named in ``like``."""
    paired = {f"{module}.lora_{factor}" for module in paired_modules(states[0]) for factor in "AB"}
    gram = product_gram([{name: state[name] for name in paired} for state in states])
    for name in like:
        if name not in paired:
            rows = np.stack([state[name].ravel() for state in states]).astype(np.float64)
            gram += rows @ rows.T
    return gram


def _coordinates(
    rule: str, origin: np.ndarray, values: np.ndarray, averaging: np.ndarray, num_byzantine: int
) -> np.ndarray:
    updates = np.tensordot(averaging, values.astype(np.float64) - origin, axes=1)
    merged = coordinate_median(updates) if rule == "coordinate_median" else trimmed_mean(updates, num_byzantine)
    return (origin + merged).astype(origin.dtype)

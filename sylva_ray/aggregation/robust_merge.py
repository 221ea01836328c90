"""Robust rules applied to client states.

A rule that returns a combination of its inputs is applied to the products B A, which do not depend on the
factorisation: the Gram matrix of the models decides the coefficients, and `sylva_ray.aggregation.factors.merge_factors`
computes the combination. The coordinate-wise rules need arrays whose entries mean the same for every client; the
parameters of a method check that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class RobustRule:
    """A robust rule and its settings in one round.

    Attributes:
        name: one of `sylva_ray.aggregation.robust.COMBINATION_RULES` and `COORDINATE_RULES`,
            ``self_centred_clipping``, or ``package.module:function``.
        num_byzantine: how many of the merged states may be malicious.
        bucket_size: states averaged at random before the rule; 1: none. It has no effect on self-centred clipping.
        seed: of the experiment, for the buckets.
        round: its number, for the buckets.
        lora_scale: alpha / rank, with which the products of adapters count in a model; where heads or norms are judged
            together with them, distances depend on it.
    """

    name: str
    num_byzantine: int
    bucket_size: int = 1
    seed: int = 0
    round: int = 0
    lora_scale: float = 1.0


def robust_merge(
    rule: RobustRule,
    states: Sequence[ClientState],
    weights: np.ndarray,
    own: int,
    origin: ClientState,
    factor_rule: str,
    frozen: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Merge ``states`` by a robust rule for one client.

    Args:
        rule: the rule.
        states: the uploads to merge.
        weights: of the neighbourhood, one per state. Only self-centred clipping uses them, because a malicious client
            may report any number of images.
        own: index of the client among ``states``.
        origin: what the client received, the origin of all updates.
        factor_rule: how LoRA factors are averaged, see `sylva_ray.aggregation.factors.merge_factors`.
        frozen: factors that do not travel and are the same for all clients (the A of LoRA-FA); with them distances are
            those of the products.

    Returns:
        The merged arrays, with the names of ``states[own]``.
    """
    anchor = states[own]
    rng = numpy_generator(rule.seed, "buckets", round=rule.round)
    averaging = buckets(len(states), rule.bucket_size if rule.name != "self_centred_clipping" else 1, rng)
    if rule.name in COORDINATE_RULES:
        return {
            name: _merge_coordinates(rule, origin[name], np.stack([state[name] for state in states]), averaging)
            for name in anchor
        }
    gram = state_gram([{**(frozen or {}), **state} for state in (*states, origin)], anchor, rule.lora_scale)
    updates = gram[:-1, :-1] - gram[:-1, -1:] - gram[-1:, :-1] + gram[-1, -1]
    if rule.name == "self_centred_clipping":
        coefficients = self_centred(updates, weights, own)
    else:
        coefficients = combination(rule.name, averaging @ updates @ averaging.T, rule.num_byzantine) @ averaging
    return merge_factors(anchor, [*states, origin], [*coefficients, 1 - coefficients.sum()], factor_rule)


def state_gram(states: Sequence[ClientState], like: ClientState, lora_scale: float) -> np.ndarray:
    """Return ``[n, n]`` inner products of models: of the scaled LoRA products, plus of the plain arrays in ``like``."""
    paired = {f"{module}.lora_{factor}" for module in paired_modules(states[0]) for factor in "AB"}
    gram = lora_scale**2 * product_gram([{name: state[name] for name in paired} for state in states])
    for name in like:
        if name not in paired:
            rows = np.stack([state[name].ravel() for state in states]).astype(np.float64)
            gram += rows @ rows.T
    return gram


def _merge_coordinates(rule: RobustRule, origin: np.ndarray, values: np.ndarray, averaging: np.ndarray) -> np.ndarray:
    """Merge ``values [n, ...]`` of one parameter by a coordinate-wise rule."""
    updates = np.tensordot(averaging, values.astype(np.float64) - origin, axes=1)
    is_median = rule.name == "coordinate_median"
    merged = coordinate_median(updates) if is_median else trimmed_mean(updates, rule.num_byzantine)
    result: np.ndarray = (origin + merged).astype(origin.dtype)
    return result

"""States between two states of one client: how much of a change to keep, how much of others' models to mix in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sylva_ray.aggregation.factors import merge_factors, paired_modules
from sylva_ray.core.types import ClientState


def interpolate(start: ClientState, end: ClientState, names: Sequence[str], share: float) -> ClientState:
    """Return ``start + share (end - start)``, of LoRA pairs the nearest product ``B A`` of the client's rank.

    A slot of a pair that is zero in both states stays zero: the client's rank is lower than the arrays'.

    Args:
        start: the state at share 0.
        end: the state at share 1.
        names: of the parameters in which the two may differ; the others keep their bits.
        share: of ``end``, in [0, 1]; at 0 and 1 the bits of one state are returned.
    """
    if share in (0, 1):
        return dict(start) | {name: (end if share else start)[name] for name in names}
    low, high = ({name: state[name] for name in names} for state in (start, end))
    used = {
        module: np.any(
            [state[f"{module}.lora_A"].any(1) | state[f"{module}.lora_B"].any(0) for state in (low, high)], 0
        )
        for module in paired_modules(low)
    }
    for state in (low, high):
        for module, slots in used.items():
            a, b = f"{module}.lora_A", f"{module}.lora_B"
            state[a], state[b] = state[a][slots], state[b][:, slots]
    between = dict(start) | merge_factors(low, [low, high], [1 - share, share], "product_svd")
    for module, slots in used.items():
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        whole_a, whole_b = np.zeros_like(start[a]), np.zeros_like(start[b])
        whole_a[slots], whole_b[:, slots] = between[a], between[b]
        between |= {a: whole_a, b: whole_b}
    return between

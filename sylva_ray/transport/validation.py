"""Check uploads where they reach the coordinator, so that nothing behind this point meets a damaged one.

A client may send NaN because its device is broken, arrays of another model, or finite numbers so large that a mean of
them destroys every model. A robust rule is no protection from these: distances to such an upload overflow.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from sylva_ray.core.types import ClientState

MAX_NORM_RATIO = 1000.0
"""An update is refused if its norm exceeds the fleet's median norm by this factor.

Honest norms differ because clients take different numbers of optimiser steps: by factors of tens in practice. Attacks
below this limit are left to the robust rules."""


MAX_GROWTH = 1e6
"""An update is refused, too, if its norm exceeds the median norm of the received arrays by this factor.

So uploads of 1e30 do not pass where they are the majority, or the only ones."""


def validate_uploads(
    uploads: Mapping[int, ClientState], received: Sequence[ClientState], names: Mapping[int, Collection[str]]
) -> tuple[dict[int, ClientState], dict[int, str]]:
    """Divide the uploads of a round into those that may be merged and those that are refused.

    An upload is accepted if it has the expected arrays of floats in the expected shapes, all entries are finite, and
    the norm of its update (upload minus received state, over all arrays) is at most `MAX_NORM_RATIO` times the lower
    median of the norms. Where that median is 0, because most clients did not move, the median norm of the received
    arrays takes its place. Unless the received arrays are all 0, it is also at most `MAX_GROWTH` times their median
    norm.

    Args:
        uploads: ``{client: state}`` as the coordinator decodes it.
        received: the states that all K clients started the round from.
        names: ``{client: names}`` of the arrays that each client has to send.

    Returns:
        The accepted uploads, and ``{client: reason}`` of the others.
    """
    refused: dict[int, str] = {}
    norms: dict[int, float] = {}
    for client, upload in uploads.items():
        if problem := _shape_problem(upload, received[client], names[client]):
            refused[client] = problem
            continue
        norms[client] = _distance(upload, received[client])
        if not math.isfinite(norms[client]) and not all(np.isfinite(value).all() for value in upload.values()):
            refused[client] = "not finite"
    updates = sorted(norm for client, norm in norms.items() if client not in refused)
    origins = (_root_of_squares([received[client][name] for name in names[client]]) for client in uploads)
    median, origin = _lower_median(updates), _lower_median(sorted(origins))
    for client, norm in norms.items():
        if client not in refused and norm > MAX_NORM_RATIO * (median or origin):
            refused[client] = f"the norm of the update exceeds {MAX_NORM_RATIO:,.0f} times the median"
        elif client not in refused and norm > MAX_GROWTH * origin > 0:
            refused[client] = f"the norm of the update exceeds {MAX_GROWTH:,.0f} times that of what was received"
    accepted = {client: upload for client, upload in uploads.items() if client not in refused}
    return accepted, dict(sorted(refused.items()))


def _shape_problem(upload: ClientState, received: ClientState, names: Collection[str]) -> str:
    """Return the first array that is missing, unexpected or of another shape, in words; '' if all are as expected."""
    for name in sorted({*names} | upload.keys()):
        if name not in upload:
            return f"{name} is missing"
        if name not in names:
            return f"{name} was not asked for"
        if upload[name].dtype.kind != "f":
            return f"{name} has dtype {upload[name].dtype}, not a float"
        shape, expected = list(upload[name].shape), list(received[name].shape)
        if shape != expected:
            return f"{name} has shape {shape}, not {expected}"
    return ""


def _distance(state: ClientState, origin: ClientState) -> float:
    """Return the norm of ``state - origin`` over the arrays of ``state``; not finite if an entry is not, or is huge."""
    with np.errstate(over="ignore", invalid="ignore"):  # both end in a norm that is not finite
        return _root_of_squares([value - origin[name] for name, value in state.items()])


def _root_of_squares(arrays: Sequence[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.vdot(array, array)) for array in arrays))


def _lower_median(values: Sequence[float]) -> float:
    """Return the middle one of sorted values, the smaller one of two; 0 if there are none."""
    return values[(len(values) - 1) // 2] if values else 0.0

"""What lying clients upload.

The attackers are omniscient: they know every honest update of the round, collude, and wait until all honest clients are done. An
update is what a client sends minus what it received; an attack is linear in it, array by array. Between LoRA factors that is the
attack on the model to first order only: B A is bilinear, so with both factors' updates negated their product stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import ClientState

ATTACKS = ("sign_flip", "gaussian", "label_flip", "alie", "ipm", "mimic", "nan")


def malicious_update(
    attack: str,
    own: ClientState,
    benign: Sequence[ClientState],
    rng: np.random.Generator,
    num_clients: int,
    num_byzantine: int,
    strength: float | None = None,
) -> dict[str, np.ndarray]:
    """The update an attacker sends, with the names, shapes and dtypes of ``own``.

    Args:
        attack: one of `ATTACKS`:

            * ``sign_flip``: -c own, c = 1 by default.
            * ``gaussian``: N(0, (c s)^2), c = 10, s the standard deviation of all honest entries of the array
              (Blanchard et al. 2017 send noise of a fixed, large size).
            * ``alie``: mean - z standard deviations, per coordinate, hidden among the honest; z from `alie_z`
              (a little is enough, Baruch et al. 2019).
            * ``ipm``: -eps mean, eps = 2 (inner product manipulation, Xie et al. 2020, whose subtle value is 0.1). It turns the
              mean of all around if ``eps f > n - f``.
            * ``mimic``: a copy of honest client 0, by all attackers, so that it outvotes the honest clients that differ from it
              (Karimireddy et al. 2022, who choose the victim by the data).
            * ``nan``: a broken client.
            * ``label_flip``: ``own`` as it is: the harm was done in training, with `flip_labels`.
        own: what the attacker would have sent, had it been honest.
        benign: the honest updates (``own``, if there are none).
        rng: for the noise.
        num_clients: n, honest and not.
        num_byzantine: f, how many of them attack.
        strength: replaces c, z or eps.
    """
    assert attack in ATTACKS, f"no such attack: {attack}"

    def chosen(default: float) -> float:
        return default if strength is None else strength

    forged = {}
    for name, value in own.items():
        others = np.stack([state[name] for state in benign or [own]]).astype(np.float64)
        if attack == "sign_flip":
            lie = -chosen(1.0) * value
        elif attack == "gaussian":
            lie = rng.normal(0, chosen(10.0) * others.std(), value.shape)
        elif attack == "alie":
            lie = others.mean(0) - chosen(alie_z(num_clients, num_byzantine)) * others.std(0)
        elif attack == "ipm":
            lie = -chosen(2.0) * others.mean(0)
        elif attack == "mimic":
            lie = others[0]
        elif attack == "nan":
            lie = np.full(value.shape, np.nan)
        else:
            lie = value
        forged[name] = np.array(lie, value.dtype)
    return forged


def alie_z(num_clients: int, num_byzantine: int) -> float:
    """How many standard deviations an attacker may be off and still look honest (Baruch et al. 2019), but at least 1.

    For a majority the f attackers need ``s = floor(n/2 + 1) - f`` honest clients on their side, so they stay nearer to the mean
    than the s most extreme of the n - f honest: ``z = Phi^-1((n - f - s) / (n - f))``. This is 1.43 for 24 of 50 but 0 for 2 of
    10: without the floor a small federation would not be attacked at all.
    """
    from scipy.special import ndtri  # for this attack alone

    honest = num_clients - num_byzantine
    supporters = max(1, num_clients // 2 + 1 - num_byzantine)
    return max(1.0, float(ndtri(max(0, honest - supporters) / honest))) if honest else 1.0


def flip_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """y -> num_classes - 1 - y; the middle class of an odd number stays."""
    return num_classes - 1 - labels


def draw_byzantine_clients(fraction: float, num_clients: int, rng: np.random.Generator) -> list[int]:
    """floor(fraction K) of the K clients, sorted. Decimal fractions count as written: 0.29 of 100 are 29."""
    count = math.floor(fraction * num_clients + 1e-9)
    return sorted(rng.choice(num_clients, count, replace=False).tolist())


def byzantine_clients(config: ExperimentConfig) -> list[int]:
    """The attackers of an experiment, sorted: a function of its seed."""
    rng = numpy_generator(config.seed, "attackers")
    return draw_byzantine_clients(config.byzantine.fraction, config.partition.num_clients, rng)

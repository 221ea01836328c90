"""Every random draw of an experiment comes from here.

A draw is named by what it is for, never by when or where it happens, so the result does not depend on the number of
actors, on the order in which they answer, or on who died and was re-run. Draws are made on the CPU and then moved.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def stable_seed(seed: int, purpose: str, client: int = -1, round: int = -1) -> int:
    """A 63-bit seed for one purpose; the same on every machine (blake2b, unlike ``hash()``).

    >>> stable_seed(0, "batches", client=3, round=1) == stable_seed(0, "batches", client=3, round=1)
    True
    >>> stable_seed(0, "batches", client=3, round=1) == stable_seed(0, "batches", client=3, round=2)
    False
    """
    key = f"{seed}/{purpose}/{client}/{round}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, client: int = -1, round: int = -1) -> torch.Generator:
    """A CPU torch generator for one purpose of one client in one round."""
    return torch.Generator().manual_seed(stable_seed(seed, purpose, client, round))


def numpy_generator(seed: int, purpose: str, client: int = -1, round: int = -1) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(stable_seed(seed, purpose, client, round))

"""Every random draw of an experiment comes from here.

A draw is named by what it is for, never by when or where it happens, so the result does not depend on the number of
actors, on the order in which they answer, or on who died and was re-run. Draws are made on the CPU and then moved.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from sylva_ray.core.lazy import torch


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


class ImageDraws:
    """Random numbers that depend on the image and on what they are for, and on nothing else.

    An attack drops images as they fall, and a fleet is cut into cohorts and windows in many ways; a stream shared by a
    batch would give every image other numbers each time. Here number j of an image is a hash of (its key, stream index,
    j): SplitMix64 (Steele et al. 2014), 24 bits of it as a float in [0, 1).
    """

    def __init__(self, keys: torch.Tensor) -> None:
        """``keys [n] int64``: see `image_keys`."""
        self.keys = keys

    def select(self, rows: torch.Tensor) -> ImageDraws:
        """The same numbers for some of the images only."""
        return ImageDraws(self.keys[rows])

    def to(self, device: torch.device | str) -> ImageDraws:
        """Draw there; the numbers are the same."""
        return ImageDraws(self.keys.to(device))

    def uniform(self, stream_index: int, shape: Sequence[int]) -> torch.Tensor:
        """``[n, *shape]`` float32 in [0, 1)."""
        position = torch.arange(math.prod(shape), device=self.keys.device)
        start = _mixed(self.keys + _signed(_GOLDEN * (stream_index + 1)))
        bits = _mixed(start[:, None] + (position + 1) * _signed(_GOLDEN))
        return (_shifted(bits, 40).float() / (1 << 24)).view(-1, *shape)

    def normal(self, stream_index: int, shape: Sequence[int]) -> torch.Tensor:
        """``[n, *shape]`` standard normal, by inversion of uniforms moved off 0."""
        u = self.uniform(stream_index, shape).double() + 2.0**-25
        return (torch.special.ndtri(u)).float()


def image_keys(seed: int, purpose: str, client: int, positions: np.ndarray) -> torch.Tensor:
    """Keys of a client's images by their positions in its split, ``[n] int64``."""
    return _mixed(torch.from_numpy(positions.astype(np.int64)) + stable_seed(seed, purpose, client))


_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The low 64 bits as a two's complement number, which is what torch's int64 arithmetic wraps around to."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """A right shift that fills with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)

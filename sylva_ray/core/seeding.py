"""Seeds and random number generators.

Every random number of an experiment is derived from the seed of the experiment, a purpose, a client and a round, never
from the state of a shared generator. So results do not depend on the number of actors, on the order in which they
finish, or on tasks that were run again. Random numbers are drawn on the CPU and then moved to the device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from sylva_ray.core.lazy import torch


def stable_seed(seed: int, purpose: str, client: int = -1, round: int = -1) -> int:
    """Return a 63-bit seed, which is the same on every machine (blake2b).

    >>> stable_seed(0, "batches", client=3, round=1) == stable_seed(0, "batches", client=3, round=1)
    True
    >>> stable_seed(0, "batches", client=3, round=1) == stable_seed(0, "batches", client=3, round=2)
    False
    """
    key = f"{seed}/{purpose}/{client}/{round}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, client: int = -1, round: int = -1) -> torch.Generator:
    """Return a torch generator on the CPU for one purpose, client and round."""
    return torch.Generator().manual_seed(stable_seed(seed, purpose, client, round))


def numpy_generator(seed: int, purpose: str, client: int = -1, round: int = -1) -> np.random.Generator:
    """Return a numpy generator for one purpose, client and round."""
    return np.random.default_rng(stable_seed(seed, purpose, client, round))


class ImageDraws:
    """Random numbers per image that do not depend on the batch in which the image is processed.

    Attacks remove images from the batch as they succeed, and a fleet is split into cohorts and windows in many ways.
    Number j of an image is therefore a hash of (key of the image, stream index, j) by SplitMix64 (Steele et al. 2014),
    of which 24 bits become a float in [0, 1).

    Args:
        keys: one key per image, ``[n] int64``; see `image_keys`.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys

    def select(self, rows: torch.Tensor) -> ImageDraws:
        """Return the numbers of some of the images; ``rows`` are indices or a mask."""
        return ImageDraws(self.keys[rows])

    def to(self, device: torch.device | str) -> ImageDraws:
        """Return the same numbers, drawn on another device."""
        return ImageDraws(self.keys.to(device))

    def uniform(self, stream_index: int, shape: Sequence[int]) -> torch.Tensor:
        """Draw uniform numbers in [0, 1).

        Args:
            stream_index: numbers of different streams are independent.
            shape: of the numbers per image.

        Returns:
            ``[n, *shape]`` float32.
        """
        position = torch.arange(math.prod(shape), device=self.keys.device)
        start = _mixed(self.keys + _signed(_GOLDEN * (stream_index + 1)))
        bits = _mixed(start[:, None] + (position + 1) * _signed(_GOLDEN))
        return (_shifted(bits, 40).float() / (1 << 24)).view(-1, *shape)

    def normal(self, stream_index: int, shape: Sequence[int]) -> torch.Tensor:
        """Draw standard normal numbers ``[n, *shape]`` by inversion of uniform ones, which are shifted away from 0."""
        u = self.uniform(stream_index, shape).double() + 2.0**-25
        standard_normal: torch.Tensor = torch.special.ndtri(u)
        return standard_normal.float()


def image_keys(seed: int, purpose: str, client: int, positions: np.ndarray) -> torch.Tensor:
    """Return the keys of a client's images for `ImageDraws`, ``[n] int64``; ``positions`` are those in its split."""
    return _mixed(torch.from_numpy(positions.astype(np.int64)) + stable_seed(seed, purpose, client))


_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """Return the low 64 bits as a signed number, since torch has no unsigned arithmetic of 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """Shift to the right and fill with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """Apply the finaliser of SplitMix64."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)

"""Seeds and random number generators.

Every random number of an experiment is derived from the seed of the experiment, a purpose, a client and a round, never
from the state of a shared generator. So results do not depend on the number of actors, on the order in which they
finish, or on tasks that were run again. What exists once per image is drawn on the device (`ImageDraws`); all else is
drawn on the CPU.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from sylva_ray.core.lazy import torch
from sylva_ray.core.philox import philox


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
    Number j of an image is therefore word j of Philox4x32-10 (`sylva_ray.core.philox`), whose key is that of the image
    and whose counter contains the stream index; 24 of its bits become a float in [0, 1). It is the same on a CPU and on
    a GPU.

    Args:
        keys: one key per image, ``[n] int64``; see `image_keys`.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys

    def select(self, rows: torch.Tensor | slice) -> ImageDraws:
        """Return the numbers of some of the images; ``rows`` are indices, a mask or a slice."""
        return ImageDraws(self.keys[rows])

    def to(self, device: torch.device | str) -> ImageDraws:
        """Return the same numbers, drawn on another device."""
        return ImageDraws(self.keys.to(device, non_blocking=True))

    def uniform(self, stream_index: int, shape: Sequence[int]) -> torch.Tensor:
        """Draw uniform numbers in [0, 1).

        Args:
            stream_index: numbers of different streams are independent.
            shape: of the numbers per image.

        Returns:
            ``[n, *shape]`` float32.
        """
        num_numbers = math.prod(shape)
        block = torch.arange(-(-num_numbers // 4), device=self.keys.device)
        zero = block[:1] * 0
        counter = (block, zero, zero + (stream_index & WORD), zero + (stream_index >> 32))
        numbers = torch.empty(len(self.keys), len(block), 4, device=self.keys.device)
        images = max(1, CHUNK[self.keys.device.type] // max(1, len(block)))
        for keys, part in zip(self.keys.split(images), numbers.split(images), strict=True):
            words = philox(counter, (keys[:, None] & WORD, (keys[:, None] >> 32) & WORD))
            for word, column in zip(words, part.unbind(2), strict=True):
                column.copy_(word.bitwise_right_shift_(8))
        return numbers.mul_(2.0**-24).view(len(self.keys), 4 * len(block))[:, :num_numbers].reshape(-1, *shape)

    def signed(self, stream_index: int, shape: Sequence[int]) -> torch.Tensor:
        """Draw uniform numbers in [-1, 1), as `uniform` does."""
        return self.uniform(stream_index, shape).mul_(2).sub_(1)

    def normal(self, stream_index: int, shape: Sequence[int]) -> torch.Tensor:
        """Draw standard normal numbers ``[n, *shape]`` by inversion of uniform ones, which are shifted away from 0."""
        u = self.uniform(stream_index, shape).double() + 2.0**-25
        standard_normal: torch.Tensor = torch.special.ndtri(u)
        return standard_normal.float()


def image_keys(
    seed: int, purpose: str, client: int, positions: np.ndarray, round: int = -1, epoch: int = 0
) -> torch.Tensor:
    """Return the keys of a client's images for `ImageDraws`, ``[n] int64``, on the CPU.

    Args:
        seed: of the experiment.
        purpose: names what the numbers are for.
        client: that has the images.
        positions: those of the images in their split, ``[n]``.
        round: of the run; -1: the numbers are the same in all rounds.
        epoch: of the stage.
    """
    key = stable_seed(seed, purpose, client, round)
    position = torch.from_numpy(positions.astype(np.int64))
    zero = position[:1] * 0
    counter = (position & WORD, position >> 32, zero + epoch, zero)
    low, high, _, _ = philox(counter, (zero + (key & WORD), zero + (key >> 32)))
    return low | high << 32


WORD = (1 << 32) - 1
"""Largest word of 32 bits."""

CHUNK = {"cpu": 2**15, "cuda": 2**22}
"""Blocks of four numbers that are drawn at once: what fits a CPU's cache, or a part of a GPU's memory."""

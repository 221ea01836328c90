"""Mini-batches of a cohort, in which every client has its own number of batches and its own random numbers.

The order, the augmentation and the attack noise of a client do not depend on the other clients of the cohort. Images
stay uint8 until the step that uses them, on the device if they fit there. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws, generator, image_keys
from sylva_ray.core.types import ClientData, ClientImages, Split
from sylva_ray.data.augment import augmented
from sylva_ray.federation.context import Batch
from sylva_ray.models.cohort import repeat_owner
from sylva_ray.models.device_memory import can_be_resident, to_device

FLIPS = 2
"""First stream of the augmentation; `Batch` has the streams below."""


def pixels(images: np.ndarray | torch.Tensor, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Convert ``[n, 3, H, W] uint8`` to floating-point numbers in [0, 1]."""
    return torch.as_tensor(images).to(device).to(dtype) / 255


class ClientStream:
    """The random numbers of one client's local training in one stage: the order of its images, and their keys.

    Args:
        seed: of the experiment.
        purpose: of the training.
        client: its number.
        round: of the run.
    """

    def __init__(self, seed: int, purpose: str, client: int, round: int) -> None:
        self._names = seed, purpose, client
        self._round, self._epoch = round, 0
        self._generator = generator(seed, purpose, client, round)

    def epoch(self, num_images: int) -> tuple[np.ndarray, torch.Tensor]:
        """Return the next epoch's order of the images, ``[n]``, and their keys in this order."""
        order: np.ndarray = torch.randperm(num_images, generator=self._generator).numpy()
        keys = image_keys(*self._names, order, self._round, self._epoch)
        self._epoch += 1
        return order, keys


def client_streams(seed: int, purpose: str, clients: Sequence[int], round: int) -> list[ClientStream]:
    """Return the random numbers of the training of several clients."""
    return [ClientStream(seed, purpose, client, round) for client in clients]


class CohortBatches:
    """The training images of C clients, epoch by epoch.

    Args:
        data: of every client.
        streams: the random numbers of every client.
        batch_size: images per client in a batch.
        augment: see `sylva_ray.data.augment.augmented`.
        dtype: of the images.
        device: of the batches, except for ``owner``.
    """

    def __init__(
        self,
        data: Sequence[ClientData],
        streams: Sequence[ClientStream],
        batch_size: int,
        augment: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.splits, self.streams = [client.train for client in data], streams
        self.batch_size, self.augment = batch_size, augment
        self.dtype, self.device = dtype, torch.device(device)
        self._starts = np.cumsum([0, *map(len, self.splits)])
        num_bytes = sum(split.images.nbytes for split in self.splits)
        self._resident = self._on_device() if can_be_resident(num_bytes, self.device) else None

    def epoch(self) -> Iterator[Batch]:
        """Yield the batches of the next epoch; a client with fewer images than others is inactive in the last ones."""
        drawn = [stream.epoch(len(split)) for stream, split in zip(self.streams, self.splits, strict=True)]
        num_steps = max(-(-len(split) // self.batch_size) for split in self.splits)
        for step in range(num_steps):
            window = slice(step * self.batch_size, (step + 1) * self.batch_size)
            chosen = [order[window] for order, _ in drawn]
            counts = [len(rows) for rows in chosen]
            draws = ImageDraws(to_device(torch.cat([keys[window] for _, keys in drawn]), self.device))
            labels = np.concatenate([split.labels[rows] for split, rows in zip(self.splits, chosen, strict=True)])
            yield Batch(
                x=pixels(augmented(self._images(chosen), self.augment, draws, FLIPS), self.dtype, self.device),
                y=to_device(torch.from_numpy(labels), self.device),
                owner=repeat_owner(counts),
                num_clients=len(counts),
                draws=draws,
                active=to_device(torch.tensor([count > 0 for count in counts]), self.device),
            )

    def _images(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """Return chosen images of every client, ``[N, 3, H, W] uint8`` on the device."""
        if self._resident is None:
            parts = [split.images[own] for split, own in zip(self.splits, rows, strict=True) if len(own)]
            return to_device(torch.from_numpy(np.concatenate(parts)), self.device)
        positions = np.concatenate([first + own for first, own in zip(self._starts, rows, strict=False)])
        return self._resident.index_select(0, to_device(torch.from_numpy(positions), self.device))

    def _on_device(self) -> torch.Tensor:
        """Return the images of all clients, ``[n, 3, H, W] uint8``."""
        resident = torch.empty(
            (self._starts[-1], *self.splits[0].images.shape[1:]), dtype=torch.uint8, device=self.device
        )
        for split, first in zip(self.splits, self._starts, strict=False):
            resident[first : first + len(split)].copy_(torch.tensor(split.images))
        return resident


def client_images(splits: Sequence[Split], dtype: torch.dtype, device: torch.device | str) -> ClientImages:
    """Put the splits of several clients, one each, into one flat batch."""
    counts = torch.tensor([len(split) for split in splits])
    x = pixels(np.concatenate([split.images for split in splits]), dtype, device)
    y = torch.from_numpy(np.concatenate([split.labels for split in splits])).to(device)
    return ClientImages(x, y, torch.repeat_interleave(torch.arange(len(splits)), counts), len(splits))


def split_draws(seed: int, purpose: str, clients: Sequence[int], splits: Sequence[Split], first: int = 0) -> ImageDraws:
    """Return the random numbers for `client_images`; ``first`` is the position of the first image of every split."""
    keys = [
        image_keys(seed, purpose, client, np.arange(first, first + len(split)))
        for client, split in zip(clients, splits, strict=True)
    ]
    return ImageDraws(torch.cat(keys))

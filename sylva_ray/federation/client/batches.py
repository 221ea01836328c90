"""Mini-batches of a cohort, in which every client has its own number of batches and its own random numbers.

The order, the augmentation and the attack noise of a client are drawn from its own generator, so they do not depend on
the other clients of the cohort. Images stay uint8 until the step that uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws, image_keys
from sylva_ray.core.types import ClientData, ClientImages, Split
from sylva_ray.data.augment import augmented
from sylva_ray.federation.context import Batch


def pixels(images: np.ndarray, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Convert ``[n, 3, H, W] uint8`` to floating-point numbers in [0, 1]."""
    return torch.tensor(images, device=device).to(dtype) / 255


def cohort_batches(
    data: Sequence[ClientData],
    streams: Sequence[torch.Generator],
    batch_size: int,
    augment: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Iterator[Batch]:
    """Yield the batches of one epoch; a client with fewer images than others is inactive in the last ones.

    Args:
        data: of every client.
        streams: the random numbers of every client.
        batch_size: images per client in a batch.
        augment: see `sylva_ray.data.augment.augmented`.
        dtype: of the images and the noise.
        device: of the batches, except for ``owner``.
    """
    orders = [torch.randperm(len(d.train), generator=g).numpy() for d, g in zip(data, streams, strict=True)]
    num_steps = max(-(-len(order) // batch_size) for order in orders)
    for step in range(num_steps):
        chosen = [order[step * batch_size : (step + 1) * batch_size] for order in orders]
        counts = [len(rows) for rows in chosen]
        images, labels, noise, uniforms = [], [], [], []
        for client, rows in enumerate(chosen):
            if len(rows):
                chosen_images = data[client].train.images[rows]
                images.append(augmented(chosen_images, augment, streams[client]))
                labels.append(data[client].train.labels[rows])
                noise.append(torch.rand(chosen_images.shape, generator=streams[client]) * 2 - 1)
                uniforms.append(torch.rand((len(rows), 2), generator=streams[client]))
        yield Batch(
            x=pixels(np.concatenate(images), dtype, device),
            y=torch.from_numpy(np.concatenate(labels)).to(device),
            owner=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
            num_clients=len(counts),
            noise=torch.cat(noise).to(device, dtype),
            active=torch.tensor([count > 0 for count in counts], device=device),
            uniforms=torch.cat(uniforms).to(device),
        )


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

"""A client's stream of batches is its own, whoever shares the cohort."""

from __future__ import annotations

import numpy as np
import torch

from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ClientData, Split
from sylva_ray.data.augment import augmented
from sylva_ray.federation.client.batches import cohort_batches
from sylva_ray.federation.context import Batch


def client(n: int, value: int) -> ClientData:
    rng = np.random.default_rng(value)
    split = Split(rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8), np.full(n, value))
    return ClientData(split, split, split, split)


def run(clients: list[ClientData]) -> list[Batch]:
    streams = [generator(0, "train", int(c.train.labels[0]), 1) for c in clients]
    return list(cohort_batches(clients, streams, 4, "flip_crop", torch.float32, "cpu"))


def test_a_client_sees_the_same_batches_alone_and_in_company() -> None:
    a, b = client(10, 1), client(5, 2)
    together, alone = run([a, b]), run([a])
    for batch, own in zip(together, alone, strict=True):
        mine = batch.owner == 0
        assert torch.equal(batch.x[mine], own.x)
        assert torch.equal(batch.noise[mine], own.noise)


def test_every_image_once_per_epoch_and_pauses_are_marked() -> None:
    batches = run([client(10, 1), client(5, 2)])
    assert [b.active.tolist() for b in batches] == [[True, True], [True, True], [True, False]]
    assert [torch.bincount(b.owner, minlength=2).tolist() for b in batches] == [[4, 4], [4, 1], [2, 0]]
    assert all((b.y == torch.tensor([1, 2])[b.owner]).all() for b in batches)
    assert all(b.x.min() >= 0 and b.x.max() <= 1 and b.noise.abs().max() <= 1 for b in batches)


def test_means_are_over_each_clients_own_images() -> None:
    (first, *_) = run([client(2, 1), client(4, 2)])
    values = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 5.0])
    assert first.mean_by_client(values).tolist() == [2.0, 2.0]


def test_crops_move_pixels_and_flips_mirror_them() -> None:
    image = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(1, 3, 8, 8)
    images = np.repeat(image, 200, 0)
    flipped = augmented(images, "flip", generator(0, "f"))
    kinds = {bytes(i.tobytes()) for i in flipped}
    assert kinds == {image[0].tobytes(), image[0, :, :, ::-1].tobytes()}
    padded = np.pad(image[0], ((0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = {padded[:, t : t + 8, k : k + 8].tobytes() for t in range(9) for k in range(9)}
    cropped = {i.tobytes() for i in augmented(images, "crop", generator(0, "c"))}
    assert cropped <= windows
    assert len(cropped) > 40

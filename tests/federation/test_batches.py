"""A client's stream of batches is its own, whoever shares the cohort."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sylva_ray.config.training import TrainingSection
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import ClientData, ParameterStack, Split
from sylva_ray.data.augment import augmented
from sylva_ray.federation.client.batches import ClientStream, CohortBatches, client_streams
from sylva_ray.federation.client.training import ClientGradients, EpochSettings, run_epochs
from sylva_ray.federation.context import Batch


def client(n: int, value: int) -> ClientData:
    rng = np.random.default_rng(value)
    split = Split(rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8), np.full(n, value))
    return ClientData(split, split, split, split)


def run(clients: list[ClientData], epochs: int = 1, round: int = 1) -> list[Batch]:
    """All batches of some epochs; the label of a client's images is its number."""
    streams = [ClientStream(0, "train", int(c.train.labels[0]), round) for c in clients]
    batches = CohortBatches(clients, streams, 4, "flip_crop", torch.float32, "cpu")
    return [batch for _ in range(epochs) for batch in batches.epoch()]


def test_a_client_sees_the_same_batches_alone_and_in_company() -> None:
    a, b = client(10, 1), client(5, 2)
    together, alone = run([a, b]), run([a])
    for batch, own in zip(together, alone, strict=True):
        mine = batch.owner == 0
        assert torch.equal(batch.x[mine], own.x)
        assert torch.equal(batch.noise[mine], own.noise)
        assert torch.equal(batch.uniforms[mine], own.uniforms)


def test_noise_belongs_to_the_image_whatever_the_batch_size() -> None:
    a = client(10, 1)

    def by_image(batch_size: int) -> dict[bytes, torch.Tensor]:
        batches = CohortBatches([a], [ClientStream(0, "train", 1, 1)], batch_size, "none", torch.float32, "cpu")
        rows = [(x.numpy().tobytes(), noise) for b in batches.epoch() for x, noise in zip(b.x, b.noise, strict=True)]
        return dict(rows)

    small, large = by_image(3), by_image(10)
    assert len(large) == 10
    assert all(torch.equal(small[image], noise) for image, noise in large.items())


def test_epochs_and_rounds_have_numbers_of_their_own() -> None:
    a = client(4, 1)
    first, second = run([a], epochs=2)
    (other,) = run([a], round=2)
    for one, two in itertools.combinations([first, second, other], 2):
        assert not set(one.noise.flatten().tolist()) & set(two.noise.flatten().tolist())


def test_every_image_once_per_epoch_and_pauses_are_marked() -> None:
    batches = run([client(10, 1), client(5, 2)])
    assert [b.active.tolist() for b in batches] == [[True, True], [True, True], [True, False]]
    assert [torch.bincount(b.owner, minlength=2).tolist() for b in batches] == [[4, 4], [4, 1], [2, 0]]
    assert all((b.y == torch.tensor([1, 2])[b.owner]).all() for b in batches)
    assert all(b.x.min() >= 0 and b.x.max() <= 1 and b.noise.abs().max() <= 1 for b in batches)


def test_means_are_over_each_clients_own_images() -> None:
    (first, *_) = run([client(2, 1), client(4, 2)])
    values = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 9.0])
    assert first.mean_by_client(values).tolist() == [2.0, 3.0]


def test_crops_move_pixels_and_flips_mirror_them() -> None:
    image = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(1, 3, 8, 8)
    images = np.repeat(image, 200, 0)
    draws = ImageDraws(torch.arange(200))
    flipped = augmented(torch.from_numpy(images), "flip", draws).numpy()
    kinds = {bytes(i.tobytes()) for i in flipped}
    assert kinds == {image[0].tobytes(), image[0, :, :, ::-1].tobytes()}
    padded = np.pad(image[0], ((0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = {padded[:, t : t + 8, k : k + 8].tobytes() for t in range(9) for k in range(9)}
    cropped = {i.tobytes() for i in augmented(torch.from_numpy(images), "crop", draws).numpy()}
    assert cropped <= windows
    assert len(cropped) > 40
    both = augmented(torch.from_numpy(images), "flip_crop", draws).numpy()
    mirrored = np.pad(image[0, :, :, ::-1], ((0, 0), (4, 4), (4, 4)), mode="reflect")
    windows |= {mirrored[:, t : t + 8, k : k + 8].tobytes() for t in range(9) for k in range(9)}
    assert {i.tobytes() for i in both} <= windows
    assert torch.from_numpy(both[3]).equal(
        augmented(torch.from_numpy(images[3:4]), "flip_crop", draws.select(torch.tensor([3])))[0]
    )


def test_the_loss_of_an_epoch_is_the_mean_over_its_images() -> None:
    """The last batch is shorter than the others."""
    splits = [Split(np.zeros((n, 3, 8, 8), np.uint8), np.arange(n)) for n in (33, 5)]  # one is done before the other
    params = {"w": torch.zeros(2, 1, dtype=torch.float64)}

    def step(_: ParameterStack, batch: Batch) -> ClientGradients:
        return {"w": torch.zeros(2, 1, dtype=torch.float64)}, batch.mean_by_client(batch.y.double())

    settings, data = EpochSettings(TrainingSection(batch_size=32), 0.0, 1), [ClientData(*[own] * 4) for own in splits]
    losses = run_epochs(params, step, data, client_streams(0, "train", [0, 1], 1), settings)
    assert losses.tolist() == pytest.approx([16.0, 2.0])

"""Random numbers of images are those of Philox, and depend on nothing but the image and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sylva_ray.core.philox import philox
from sylva_ray.core.seeding import CHUNK, ImageDraws, image_keys, stable_seed

# Published with Random123 (Salmon et al. 2011), kat_vectors, philox4x32 of 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The ten rounds as the paper has them, in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_published_answers(counter: str, key: str, result: str) -> None:
    asked = [torch.tensor([word]) for word in words(counter) + words(key)]
    found = philox(tuple(asked[:4]), (asked[4], asked[5]))
    assert [int(word) for word in found] == plain_philox(words(counter), words(key)) == words(result)


def test_any_counter_and_key() -> None:
    asked = np.random.default_rng(0).integers(0, 2**32, (6, 200))
    tensors = [torch.from_numpy(row) for row in asked]
    found = torch.stack(philox(tuple(tensors[:4]), (tensors[4], tensors[5]))).numpy()
    for column, result in zip(asked.T.tolist(), found.T.tolist(), strict=True):
        assert result == plain_philox(column[:4], column[4:])


@pytest.mark.parametrize("stream_index", [0, 7, 2**40 + 3])
def test_a_number_is_a_word_of_the_key_and_the_stream(stream_index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many numbers an image has, and however many images are drawn at once."""
    keys = torch.tensor([5, -3, 2**62 + 11])
    numbers = ImageDraws(keys).uniform(stream_index, (2, 5))
    for key, row in zip(keys.tolist(), numbers.flatten(1).tolist(), strict=True):
        for j, number in enumerate(row):
            counter = [j // 4, 0, stream_index & 0xFFFFFFFF, stream_index >> 32]
            word = plain_philox(counter, [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF])[j % 4]
            assert number == (word >> 8) / 2**24
    monkeypatch.setitem(CHUNK, "cpu", 1)
    assert torch.equal(ImageDraws(keys).uniform(stream_index, (11,))[:, :10], numbers.flatten(1))


def test_the_key_of_an_image_is_two_words_of_its_position() -> None:
    (key,) = image_keys(3, "x", 1, np.array([9]), round=2, epoch=4).tolist()
    seed = stable_seed(3, "x", 1, 2)
    low, high, _, _ = plain_philox([9, 0, 4, 0], [seed & 0xFFFFFFFF, seed >> 32])
    assert key & (2**64 - 1) == low | high << 32


def test_keys_differ_by_everything_that_they_are_named_by() -> None:
    names = [(0, "x", 1, 2, 0), (1, "x", 1, 2, 0), (0, "y", 1, 2, 0), (0, "x", 2, 2, 0), (0, "x", 1, 3, 0)]
    names.append((0, "x", 1, 2, 1))
    keys = [image_keys(s, p, c, np.arange(1000), r, e) for s, p, c, r, e in names]
    assert len(torch.cat(keys).unique()) == 6000
    assert len(image_keys(0, "x", 1, np.arange(0))) == 0


def test_no_images_have_no_numbers() -> None:
    assert ImageDraws(torch.empty(0, dtype=torch.int64)).uniform(0, (3, 4)).shape == (0, 3, 4)

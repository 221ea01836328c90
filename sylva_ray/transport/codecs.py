"""Codecs of updates: an update is the trained state minus the state that the client received.

* `Full`: float32 unchanged.
* `BlockQuantizer`: in every block of 64 entries ``x ~ step * code`` with codes in -127..127 or -7..7 and ``step = max
  |x| / 127`` or ``/ 7`` (block-wise quantisation, Dettmers et al. 2022). The step travels as a bfloat16: two bytes with
  float32's range. With float16, whose smallest positive number is 6e-8, small updates would need a second scale.
* `TopK`: the largest entries of the whole update with their positions (Stich et al. 2018).

All are deterministic. The encoded form is ``{name: array}``. The receiver knows the shapes, so the two lossy codecs
concatenate all arrays in the order of their names, and a file of 48 LoRA factors needs one header. An update that is
not finite decodes to one that is not finite, which the receiver drops. `sylva_ray.transport.compression` adds error
feedback.

A comparison of the bytes of a quantised adapter with those of float32 full fine-tuning favours the adapter; quantise
the full model as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import safetensors.numpy

from sylva_ray.config.experiment import CompressionSection
from sylva_ray.core.types import ClientState

MIN_STEP = 2.0**-126
"""The smallest normal bfloat16 (and float32). A smaller step would lose digits; a block of zeros needs a step too."""

BFLOAT16_NAN = 0x7FC0
"""The bits of a quiet NaN."""

Shapes = Mapping[str, tuple[int, ...]]


class Codec(Protocol):
    """Turns an update into arrays that travel, and back."""

    def encode(self, update: ClientState) -> dict[str, np.ndarray]:
        """Return the arrays that travel."""
        ...

    def decode(self, encoded: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
        """Return ``{name: float32 array of shape shapes[name]}``."""
        ...

    def num_bytes(self, shapes: Shapes) -> int:
        """Return the bytes of the arrays that travel for an update of these shapes, without encoding one."""
        ...


@dataclass(frozen=True)
class Full:
    """The identity in float32; arrays that are float32 already are not copied."""

    def encode(self, update: ClientState) -> dict[str, np.ndarray]:
        """See `Codec.encode`."""
        return {name: np.asarray(value, np.float32, order="C") for name, value in update.items()}

    def decode(self, encoded: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
        """See `Codec.decode`."""
        return {name: encoded[name].reshape(shape) for name, shape in shapes.items()}

    def num_bytes(self, shapes: Shapes) -> int:
        """See `Codec.num_bytes`."""
        return 4 * _entries(shapes)


@dataclass(frozen=True)
class BlockQuantizer:
    """Symmetric quantisation with one step per ``block`` consecutive entries; a block ends where its array ends.

    Encoded are ``codes`` (int8 ``[n]``, or uint8 ``[ceil(n / 2)]`` with two 4-bit codes in each, the first in the low
    bits, both plus 8) and ``steps`` (``[blocks] uint16``: bfloat16 bits). The error of an entry is at most half the
    step of its block. The step is rounded to nearest, by 1/257 at most. As 127 / (1 +- 1/257) is between 126.5 and
    127.5, the largest entry always gets the largest code, its error is also at most half a step, and coding a decoded
    update again changes nothing.

    Attributes:
        bits: 4 or 8.
        block: entries that share a step.
    """

    bits: int = 8
    block: int = 64

    def __post_init__(self) -> None:
        assert self.bits in (4, 8), f"bits must be 4 or 8, not {self.bits}"
        assert self.block > 0, "a block has at least one entry"

    @property
    def levels(self) -> int:
        """Return the largest code."""
        return (1 << self.bits - 1) - 1

    def encode(self, update: ClientState) -> dict[str, np.ndarray]:
        """See `Codec.encode`."""
        codes, steps = [np.zeros(0, np.int8)], [np.zeros(0, np.uint16)]
        for name in sorted(update):
            array_codes, array_steps = self._quantize(np.asarray(update[name], np.float64).ravel())
            codes.append(array_codes)
            steps.append(array_steps)
        flat = np.concatenate(codes)
        return {"codes": _pack(flat) if self.bits == 4 else flat, "steps": np.concatenate(steps)}

    def decode(self, encoded: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
        """See `Codec.decode`."""
        entries = _entries(shapes)
        codes = _unpack(encoded["codes"])[:entries] if self.bits == 4 else encoded["codes"]
        lengths = [length for name in sorted(shapes) for length in self._lengths(math.prod(shapes[name]))]
        matches = len(codes) == entries and len(encoded["steps"]) == len(lengths)
        assert matches, "the encoded arrays are not an update of these shapes"
        steps = np.repeat(_from_bfloat16(encoded["steps"]), np.array(lengths, np.int64))
        return _split(codes * steps, shapes)

    def num_bytes(self, shapes: Shapes) -> int:
        """See `Codec.num_bytes`."""
        blocks = sum(len(self._lengths(math.prod(shape))) for shape in shapes.values())
        return (_entries(shapes) * self.bits + 7) // 8 + 2 * blocks

    def _lengths(self, size: int) -> list[int]:
        """Return the lengths of the blocks of an array with ``size`` entries; the last one may be shorter."""
        return [self.block] * (size // self.block) + [size % self.block] * (size % self.block > 0)

    def _quantize(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quantise ``[n] float64``: ``codes [n] int8``, ``steps [ceil(n / block)] uint16``; steps may be NaN."""
        blocks = np.pad(flat, (0, -len(flat) % self.block)).reshape(-1, self.block)
        peak = np.abs(blocks).max(axis=1)
        bits = _to_bfloat16(np.maximum(peak / self.levels, MIN_STEP))
        step = _from_bfloat16(bits).astype(np.float64)[:, None]
        with np.errstate(invalid="ignore"):
            codes = np.clip(np.rint(blocks / step), -self.levels, self.levels)
        return np.where(np.isnan(step), 0, codes).astype(np.int8).ravel()[: len(flat)], bits


@dataclass(frozen=True)
class TopK:
    """The ``fraction`` of entries with the largest magnitude, over the whole update.

    Of all choices of k entries over all arrays this one loses least, ``delta >= k / n``. With error feedback arrays of
    small entries are sent too, as their residual grows. Encoded are ``indices [k] int32`` into the concatenated arrays,
    ascending, and ``values [k] float32``, exact. Of equal magnitudes the first is taken. NaN counts as infinite.

    Attributes:
        fraction: in (0, 1].
    """

    fraction: float = 0.01

    def __post_init__(self) -> None:
        assert 0 < self.fraction <= 1, f"a fraction is in (0, 1], not {self.fraction}"

    def count(self, entries: int) -> int:
        """Return how many of ``entries`` entries travel: the nearest whole number, at least one."""
        return min(entries, max(1, round(self.fraction * entries)))

    def encode(self, update: ClientState) -> dict[str, np.ndarray]:
        """See `Codec.encode`."""
        flat = np.concatenate([np.zeros(0, np.float32), *(np.ravel(update[name]) for name in sorted(update))])
        assert len(flat) < 2**31, "int32 indices reach 2^31 entries"
        indices = _largest(flat, self.count(len(flat)))
        return {"indices": indices.astype(np.int32), "values": flat[indices].astype(np.float32)}

    def decode(self, encoded: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
        """See `Codec.decode`."""
        flat = np.zeros(_entries(shapes), np.float32)
        assert len(encoded["indices"]) == self.count(len(flat)), "the encoded arrays are not an update of these shapes"
        flat[encoded["indices"]] = encoded["values"]
        return _split(flat, shapes)

    def num_bytes(self, shapes: Shapes) -> int:
        """See `Codec.num_bytes`."""
        return 8 * self.count(_entries(shapes))


def create_codec(kind: str, *, fraction: float = 0.01) -> Codec:
    """Return the codec ``none``, ``int8``, ``int4`` or ``topk`` (with ``fraction``)."""
    if kind == "topk":
        return TopK(fraction)
    if kind in ("int8", "int4"):
        return BlockQuantizer(int(kind.removeprefix("int")))
    assert kind == "none", f"there is no codec {kind}"
    return Full()


def codec_from_config(section: CompressionSection) -> Codec | None:
    """Return the codec of the ``compression`` section, or None without compression."""
    return None if section.kind == "none" else create_codec(section.kind, fraction=section.fraction)


def array_shapes(state: ClientState) -> dict[str, tuple[int, ...]]:
    """Return ``{name: shape}`` of a state."""
    return {name: value.shape for name, value in state.items()}


def file_content(arrays: ClientState) -> bytes:
    """Return the file that travels, in the safetensors format: a small header, then the bytes of the arrays."""
    return safetensors.numpy.save({name: np.asarray(value, order="C") for name, value in arrays.items()})


def _entries(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _split(flat: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """Undo the concatenation of all arrays in the order of their names; the result has the order of ``shapes``."""
    names = sorted(shapes)
    ends = np.cumsum([math.prod(shapes[name]) for name in names])
    parts = dict(zip(names, np.split(flat, ends[:-1]), strict=True)) if names else {}
    return {name: parts[name].reshape(shape) for name, shape in shapes.items()}


def _largest(flat: np.ndarray, count: int) -> np.ndarray:
    """Return ascending indices of the ``count`` entries of largest magnitude, the first ones among equals."""
    if count == 0:
        return np.zeros(0, np.int64)
    magnitude = np.abs(flat)
    magnitude[np.isnan(magnitude)] = np.inf
    threshold = np.partition(magnitude, len(flat) - count)[len(flat) - count]
    above = np.flatnonzero(magnitude > threshold)
    equal = np.flatnonzero(magnitude == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the ``uint16`` bits of positive numbers rounded to nearest even; infinite numbers become NaN."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    word = single.view(np.uint32)
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return np.where(np.isfinite(single), rounded, BFLOAT16_NAN).astype(np.uint16)


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _pack(codes: np.ndarray) -> np.ndarray:
    """Pack ``[n] int8`` in -7..7 into ``[ceil(n / 2)] uint8``."""
    nibbles = (np.pad(codes, (0, len(codes) % 2)) + 8).astype(np.uint8)
    return nibbles[0::2] | nibbles[1::2] << 4


def _unpack(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=1).ravel().astype(np.int8) - 8

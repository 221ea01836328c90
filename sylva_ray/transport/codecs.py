"""Codecs for what a client uploads: its update, the trained state minus the state it received.

* ``Full``: float32 as it is.
* ``BlockQuantizer``: in every block of 64 entries ``x ~ step * code`` with codes in -127..127 or -7..7 and
  ``step = max |x| / 127`` or ``/ 7`` (Dettmers et al. 2022, block-wise quantisation). The step travels as a bfloat16: two bytes
  with float32's range, so small updates need no second scale, as they would with float16 (6e-8 is its last positive number).
* ``TopK``: the largest entries of the whole update with their places (Stich et al. 2018).

All three are deterministic and forget a part of the update; *error feedback* (Seide et al. 2014; Karimireddy et al. 2019) adds
the forgotten part to the next update. All three contract, ``|C(x) - x|^2 <= (1 - delta) |x|^2`` with ``delta > 0``, so the
residual stays bounded and, while the coordinates stay the same, what arrives over the rounds differs from what was meant by one
residual only. (Product-SVD merging rewrites LoRA pairs in other coordinates every round: nothing is owed of those.)

A wire is ``{name: array}``; the receiver knows the shapes, so the two lossy codecs put all arrays, in the order of their names,
into one, and a file of 48 LoRA factors pays for one header. An update that is not finite stays so, for the receiver to drop.

Bytes against float32 full fine-tuning flatter a quantised adapter: quantise the full model alike for a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import safetensors.numpy

from sylva_ray.core.types import ClientState, state_bytes

SMALLEST_STEP = 2.0**-126
"""The smallest normal bfloat16 (and float32): steps below it would lose digits, and a block of zeros needs one too."""

BFLOAT16_NAN = 0x7FC0
"""The bits of a quiet NaN."""

Shapes = Mapping[str, tuple[int, ...]]


class Codec(Protocol):
    """How an update becomes bytes, and what the receiver makes of them."""

    def encode(self, update: ClientState) -> dict[str, np.ndarray]:
        """The arrays that travel."""

    def decode(self, wire: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
        """``{name: float32 array of shapes[name]}``."""

    def num_bytes(self, shapes: Shapes) -> int:
        """Bytes of the arrays that travel for an update of these shapes, without making them."""


@dataclass(frozen=True)
class Full:
    """float32, bit for bit (and the same memory where the update is float32 already)."""

    def encode(self, update: ClientState) -> dict[str, np.ndarray]:
        return {name: np.asarray(value, np.float32, order="C") for name, value in update.items()}

    def decode(self, wire: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
        return {name: wire[name].reshape(shape) for name, shape in shapes.items()}

    def num_bytes(self, shapes: Shapes) -> int:
        return 4 * _entries(shapes)


@dataclass(frozen=True)
class BlockQuantizer:
    """Symmetric quantisation with one step per ``block`` consecutive entries of an array (blocks end where arrays end).

    The wire: ``codes`` (int8 ``[n]``, or uint8 ``[ceil(n / 2)]`` with two 4-bit codes in each, the first in the low bits, each
    plus 8) and ``steps`` (``[blocks] uint16``: bfloat16 bits). An entry is wrong by at most half its block's step. The step is
    rounded to nearest, by 1/257 at most; as 127 / (1 +- 1/257) is between 126.5 and 127.5, the largest entry always gets the
    largest code, is wrong by half a step like any other, and coding what was decoded changes nothing.
    """

    bits: int = 8
    block: int = 64

    def __post_init__(self) -> None:
        assert self.bits in (4, 8), f"bits must be 4 or 8, not {self.bits}"
        assert self.block > 0, "a block has at least one entry"

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def encode(self, update: ClientState) -> dict[str, np.ndarray]:
        codes, steps = [np.zeros(0, np.int8)], [np.zeros(0, np.uint16)]
        for name in sorted(update):
            array_codes, array_steps = self._quantize(np.asarray(update[name], np.float64).ravel())
            codes.append(array_codes)
            steps.append(array_steps)
        flat = np.concatenate(codes)
        return {"codes": _pack(flat) if self.bits == 4 else flat, "steps": np.concatenate(steps)}

    def decode(self, wire: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
        entries = _entries(shapes)
        codes = _unpack(wire["codes"])[:entries] if self.bits == 4 else wire["codes"]
        lengths = [length for name in sorted(shapes) for length in self._lengths(math.prod(shapes[name]))]
        matches = len(codes) == entries and len(wire["steps"]) == len(lengths)
        assert matches, "the wire is not an update of these shapes"
        steps = np.repeat(_from_bfloat16(wire["steps"]), np.array(lengths, np.int64))
        return _split(codes * steps, shapes)

    def num_bytes(self, shapes: Shapes) -> int:
        blocks = sum(len(self._lengths(math.prod(shape))) for shape in shapes.values())
        return (_entries(shapes) * self.bits + 7) // 8 + 2 * blocks

    def _lengths(self, size: int) -> list[int]:
        """Of the blocks of an array with so many entries; the last one may be shorter."""
        return [self.block] * (size // self.block) + [size % self.block] * (size % self.block > 0)

    def _quantize(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``[n] float64`` -> ``codes [n] int8``, ``steps [ceil(n / block)] uint16``; NaN steps where not all is finite."""
        blocks = np.pad(flat, (0, -len(flat) % self.block)).reshape(-1, self.block)
        peak = np.abs(blocks).max(axis=1)
        bits = _to_bfloat16(np.maximum(peak / self.levels, SMALLEST_STEP))
        step = _from_bfloat16(bits).astype(np.float64)[:, None]
        with np.errstate(invalid="ignore"):
            codes = np.clip(np.rint(blocks / step), -self.levels, self.levels)
        return np.where(np.isnan(step), 0, codes).astype(np.int8).ravel()[: len(flat)], bits


@dataclass(frozen=True)
class TopK:
    """The ``fraction`` of entries that is largest in magnitude, over the whole update.

    Over the whole update, not per array: of all choices of k entries this one loses least, ``delta >= k / n``. Error feedback
    brings the arrays with small entries in as their residual grows. The wire: ``indices [k] int32`` into the concatenated
    arrays, ascending, and ``values [k] float32``, exact. Equal magnitudes: the first one wins. NaN counts as infinite.
    """

    fraction: float = 0.01

    def __post_init__(self) -> None:
        assert 0 < self.fraction <= 1, f"a fraction is in (0, 1], not {self.fraction}"

    def count(self, entries: int) -> int:
        """How many entries of so many travel: the nearest whole number, but one at least."""
        return min(entries, max(1, round(self.fraction * entries)))

    def encode(self, update: ClientState) -> dict[str, np.ndarray]:
        flat = np.concatenate([np.zeros(0, np.float32), *(np.ravel(update[name]) for name in sorted(update))])
        assert len(flat) < 2**31, "int32 indices reach 2^31 entries"
        indices = _largest(flat, self.count(len(flat)))
        return {"indices": indices.astype(np.int32), "values": flat[indices].astype(np.float32)}

    def decode(self, wire: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
        flat = np.zeros(_entries(shapes), np.float32)
        assert len(wire["indices"]) == self.count(len(flat)), "the wire is not an update of these shapes"
        flat[wire["indices"]] = wire["values"]
        return _split(flat, shapes)

    def num_bytes(self, shapes: Shapes) -> int:
        return 8 * self.count(_entries(shapes))


def create_codec(kind: str, *, block: int = 64, fraction: float = 0.01) -> Codec:
    """``kind`` is ``none``, ``int8``, ``int4`` (both with ``block``) or ``topk`` (with ``fraction``)."""
    if kind == "topk":
        return TopK(fraction)
    if kind in ("int8", "int4"):
        return BlockQuantizer(int(kind.removeprefix("int")), block)
    assert kind == "none", f"no such codec: {kind}"
    return Full()


def shapes_of(state: ClientState) -> dict[str, tuple[int, ...]]:
    """``{name: shape}``: what the receiver knows."""
    return {name: value.shape for name, value in state.items()}


def payload(wire: Mapping[str, np.ndarray]) -> bytes:
    """The file that travels (safetensors: the arrays' bytes after a small header)."""
    return safetensors.numpy.save(dict(wire))


@dataclass(frozen=True)
class Transmission:
    """One upload: what the receiver has (``decoded``, float32), what it lacks (``residual``), and the bytes of both the arrays
    and the file around them."""

    decoded: dict[str, np.ndarray]
    residual: dict[str, np.ndarray] | None
    num_bytes: int
    payload_bytes: int


def transmit(codec: Codec, update: ClientState, residual: ClientState | None = None) -> Transmission:
    """Send ``C(update + residual)``; the new residual is ``update + residual - decoded``.

    Args:
        codec: both ends'.
        update: the trained state minus the received one.
        residual: what the last transmission left, ``{}`` before the first one; None: no error feedback.

    Returns:
        The transmission. Residuals have the dtype of ``update + residual``; with float32 for both, a quantiser's subtraction
        is exact (a decoded entry is 0 or within a factor of 2), so only the sum ``update + residual`` is ever rounded. An
        update that is not finite leaves the residual as it was: the receiver drops it, and one NaN must not stay for ever.
    """
    target = update if residual is None else {name: _add(value, residual.get(name)) for name, value in update.items()}
    wire, shapes = codec.encode(target), shapes_of(target)
    decoded = codec.decode(wire, shapes)
    if residual is None:
        left = None
    elif all(np.isfinite(value).all() for value in decoded.values()):
        left = {name: np.asarray(value - decoded[name]) for name, value in target.items()}
    else:
        left = dict(residual)
    return Transmission(decoded, left, state_bytes(wire), len(payload(wire)))


def _add(value: np.ndarray, residual: np.ndarray | None) -> np.ndarray:
    """The sum, where there is something to add (-0 + 0 would be +0, and no longer the same bits)."""
    return value if residual is None or not residual.any() else np.asarray(value + residual)


def _entries(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _split(flat: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """Undo the concatenation in the order of the names; the result has the order of ``shapes``."""
    names = sorted(shapes)
    ends = np.cumsum([math.prod(shapes[name]) for name in names])
    parts = dict(zip(names, np.split(flat, ends[:-1]), strict=True)) if names else {}
    return {name: parts[name].reshape(shape) for name, shape in shapes.items()}


def _largest(flat: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the ``count`` entries of largest magnitude; among equals the first ones."""
    if count == 0:
        return np.zeros(0, np.int64)
    magnitude = np.abs(flat)
    magnitude[np.isnan(magnitude)] = np.inf
    threshold = np.partition(magnitude, len(flat) - count)[len(flat) - count]
    above = np.flatnonzero(magnitude > threshold)
    equal = np.flatnonzero(magnitude == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits ``uint16`` of positive numbers: float32's upper half, rounded to nearest even; infinite and NaN give NaN."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    word = single.view(np.uint32)
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return np.where(np.isfinite(single), rounded, BFLOAT16_NAN).astype(np.uint16)


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _pack(codes: np.ndarray) -> np.ndarray:
    """``[n] int8`` in -7..7 -> ``[ceil(n / 2)] uint8``."""
    nibbles = (np.pad(codes, (0, len(codes) % 2)) + 8).astype(np.uint8)
    return nibbles[0::2] | nibbles[1::2] << 4


def _unpack(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=1).ravel().astype(np.int8) - 8

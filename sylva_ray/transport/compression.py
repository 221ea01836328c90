"""Compression of what travels, with error feedback.

All codecs but the identity lose a part of the update. *Error feedback* (Seide et al. 2014; Karimireddy et al. 2019)
adds the lost part, the residual, to the client's next update. Every codec C contracts, ``|C(x) - x|^2 <= (1 - delta)
|x|^2`` with ``delta > 0``, so the residual stays bounded. As long as the coordinates stay the same, the sum of the
decoded updates differs from the sum of the true ones by one residual only. Product-SVD merging rewrites LoRA factors in
other coordinates every round, where an old residual would be noise; no residual of those factors is kept. The answer
turns them back as far as that leaves their product, so that what is coded is the change of the model and not that of
the coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sylva_ray.aggregation.factors import aligned_pair, paired_modules
from sylva_ray.config.experiment import CompressionSection
from sylva_ray.core.types import ClientState
from sylva_ray.transport.codecs import Codec, array_shapes
from sylva_ray.transport.postprocessor import Direction, Message, Packing, Postprocessor, add, subtract


class Compression(Postprocessor):
    """Sends coded updates in place of states, in both directions or for uploads only.

    Top-k is used for uploads only: the answer's update has no few large entries, and the coordinator keeps no
    residuals.

    Args:
        codec: the codec of both ends.
        section: ``compression`` of the configuration: error feedback, and whether downloads are coded.
        packing: the method, which says which parameters are refactored.
    """

    def __init__(self, codec: Codec, section: CompressionSection, packing: Packing) -> None:
        self.codec, self.packing = codec, packing
        self.error_feedback = section.error_feedback
        self.codes_downloads = section.download and section.kind != "topk"

    def encode(self, arrays: ClientState, message: Message) -> ClientState:
        """Code the update; of an upload with error feedback, plus the client's residual, which is then replaced."""
        if not self._codes(message.direction):
            return arrays
        if message.direction == "download":
            arrays = self._aligned(arrays, message.reference)
        update = subtract(arrays, message.reference)
        if message.direction == "download" or not self.error_feedback:
            return self.codec.encode(update)
        sent = transmit(self.codec, update, message.residual)
        assert sent.residual is not None, "error feedback leaves a residual"
        message.residual.update(
            {name: value for name, value in sent.residual.items() if not self.packing.is_refactored(name)}
        )
        return sent.encoded

    def decode(self, arrays: ClientState, message: Message) -> ClientState:
        """Return the reference plus the decoded update."""
        if not self._codes(message.direction):
            return arrays
        return add(message.reference, self.codec.decode(arrays, array_shapes(message.reference)))

    def num_bytes(self, before: int, state: ClientState, direction: Direction) -> int:
        """Return the bytes of a coded update of that form."""
        return self.codec.num_bytes(array_shapes(state)) if self._codes(direction) else before

    def _aligned(self, arrays: ClientState, reference: ClientState) -> ClientState:
        """Return arrays whose refactored pairs are as near as possible to those of the receiver."""
        turned = dict(arrays)
        for module in paired_modules(arrays):
            a, b = f"{module}.lora_A", f"{module}.lora_B"
            if self.packing.is_refactored(a):
                turned[a], turned[b] = aligned_pair(arrays[a], arrays[b], reference[a], reference[b])
        return turned

    def _codes(self, direction: Direction) -> bool:
        return direction == "upload" or self.codes_downloads


@dataclass(frozen=True)
class Transmission:
    """One coded update.

    Attributes:
        encoded: the arrays that travel.
        decoded: what the receiver makes of them, float32.
        residual: what the receiver lacks; None without error feedback.
    """

    encoded: dict[str, np.ndarray]
    decoded: dict[str, np.ndarray]
    residual: dict[str, np.ndarray] | None


def transmit(codec: Codec, update: ClientState, residual: ClientState | None = None) -> Transmission:
    """Code ``update + residual``; the new residual is ``update + residual - decoded``.

    Args:
        codec: the codec of both ends.
        update: the trained state minus the received one.
        residual: what the client's last transmission left, ``{}`` before the first one; None: no error feedback.

    Returns:
        The transmission. Residuals have the dtype of ``update + residual``. With float32 for both, a quantiser's
        subtraction is exact (a decoded entry is 0 or within a factor of 2), so only the sum ``update + residual`` is
        rounded. An update that is not finite leaves the residual unchanged: the coordinator drops such an upload, and
        later ones must not inherit its NaN.
    """
    target = update if residual is None else {name: _sum(value, residual.get(name)) for name, value in update.items()}
    encoded = codec.encode(target)
    decoded = codec.decode(encoded, array_shapes(target))
    if residual is None:
        new_residual = None
    elif all(np.isfinite(value).all() for value in decoded.values()):
        new_residual = {name: np.asarray(value - decoded[name]) for name, value in target.items()}
    else:
        new_residual = dict(residual)
    return Transmission(encoded, decoded, new_residual)


def _sum(value: np.ndarray, residual: np.ndarray | None) -> np.ndarray:
    """Return the sum, or ``value`` itself where the residual is zero: -0 + 0 is +0, which has other bits."""
    return value if residual is None or not residual.any() else np.asarray(value + residual)

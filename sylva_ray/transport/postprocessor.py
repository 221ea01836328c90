"""What happens to an upload or an answer on its way between a client and the coordinator.

A run has one ordered list of postprocessors (`sylva_ray.transport.registry.create_postprocessors`); a method adds its
own by overriding `sylva_ray.federation.method.Method.postprocessors`. The sender applies `Postprocessor.encode` of each
in the order of the list, then the bytes are counted, and the receiver reverses them from the last to the first.
Compression and Byzantine clients are two of them. Noise for differential privacy, or a mask that the coordinator
removes, is one more class:

>>> class Masked(Postprocessor):
...     def encode(self, arrays, message):
...         return {name: value + 8 for name, value in arrays.items()}
...
...     def decode(self, arrays, message):
...         return {name: value - 8 for name, value in arrays.items()}
>>> mask, message = Masked(), Message("upload", client=0, step=1, reference={})
>>> sent = mask.encode({"x": np.float32([1, 2])}, message)
>>> sent["x"].tolist(), mask.decode(sent, message)["x"].tolist()
([9.0, 10.0], [1.0, 2.0])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from sylva_ray.core.types import ClientState

Direction = Literal["upload", "download"]
"""From the client to the coordinator, or back."""


class Packing(Protocol):
    """The part of a method that decides what travels: see `sylva_ray.federation.contract.Algorithm`."""

    def pack(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """Return the arrays of ``state`` that ``client`` uploads."""
        ...

    def unpack(self, client: int, upload: ClientState) -> dict[str, np.ndarray]:
        """Return an upload in the shapes of a state."""
        ...

    def is_refactored(self, name: str) -> bool:
        """Return whether merging rewrites this parameter in other coordinates."""
        ...


@dataclass(frozen=True)
class Message:
    """One transfer between a client and the coordinator, as both ends know it.

    Attributes:
        direction: see `Direction`.
        client: number of the client.
        step: position of the stage in the run.
        reference: the packed state that the client started the round from. Both ends have it, so updates relative to it
            can travel instead of states.
        residual: ``{name: array}`` that the client keeps until its next upload. A postprocessor may change it in
            `encode`, under names that no other one uses. Checkpoints store it.
    """

    direction: Direction
    client: int
    step: int
    reference: ClientState
    residual: dict[str, np.ndarray] = field(default_factory=dict)


class Postprocessor:
    """A transformation of what travels. By default it leaves everything as it is.

    A method that changes nothing must return its argument, not a copy: a download that no postprocessor changed is not
    unpacked again.
    """

    def encode(self, arrays: ClientState, message: Message) -> ClientState:
        """Return what the sender puts on the wire in place of ``arrays``; its bytes are counted."""
        del message
        return arrays

    def decode(self, arrays: ClientState, message: Message) -> ClientState:
        """Return what the receiver makes of ``arrays``, with the names and shapes that `encode` was given."""
        del message
        return arrays

    def num_bytes(self, before: int, state: ClientState, direction: Direction) -> int:
        """Return the bytes of what `encode` returns, without encoding anything; by default as many as before.

        Args:
            before: bytes of what `encode` is given.
            state: the packed state at the beginning of the list, for the shapes of its arrays.
            direction: of the transfer.
        """
        del state, direction
        return before

    def decode_round(
        self, uploads: Mapping[int, ClientState], messages: Mapping[int, Message]
    ) -> Mapping[int, ClientState]:
        """Decode all uploads of a round, ``{client: arrays}``.

        By default each is decoded by itself. Override this where the result depends on the uploads of other clients.
        """
        return {client: self.decode(arrays, messages[client]) for client, arrays in uploads.items()}


def subtract(arrays: ClientState, reference: ClientState) -> dict[str, np.ndarray]:
    """Return the update from ``reference`` to ``arrays``, name by name."""
    return {name: value - reference[name] for name, value in arrays.items()}


def add(reference: ClientState, update: ClientState) -> dict[str, np.ndarray]:
    """Return ``reference`` plus ``update`` for the names of the update, in the reference's dtypes."""
    return {name: (reference[name] + value).astype(reference[name].dtype) for name, value in update.items()}

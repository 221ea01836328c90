"""The connection between the clients and the coordinator: it runs the postprocessors and counts bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sylva_ray.core.types import ClientState, state_bytes
from sylva_ray.transport.codecs import file_content
from sylva_ray.transport.postprocessor import Message, Packing, Postprocessor


@dataclass
class Traffic:
    """Bytes that were carried.

    Attributes:
        upload: bytes of the arrays from the clients.
        upload_payload: bytes of the files that contain those arrays.
        download: bytes of the arrays to the clients.
        download_payload: bytes of the files that contain those arrays.
    """

    upload: int = 0
    upload_payload: int = 0
    download: int = 0
    download_payload: int = 0


class Wire:
    """Carries packed states in both directions.

    Args:
        packing: the method: what a client uploads of its state, and back.
        postprocessors: applied by the sender in this order, reversed by the receiver.

    Attributes:
        traffic: bytes carried so far; the caller replaces it to count anew.
        residuals: ``{client: {name: array}}``, what postprocessors keep of a client until its next upload. Checkpoints
            store it.
    """

    def __init__(self, packing: Packing, postprocessors: Sequence[Postprocessor] = ()) -> None:
        self.packing, self.postprocessors = packing, tuple(postprocessors)
        self.residuals: dict[int, dict[str, np.ndarray]] = {}
        self.traffic = Traffic()

    def upload(
        self,
        step: int,
        received: Sequence[ClientState],
        trained: Mapping[int, ClientState],
        names: Sequence[str] | None = None,
    ) -> dict[int, ClientState]:
        """Carry the uploads of a round to the coordinator.

        Args:
            step: position of the stage in the run.
            received: the states that all K clients started from.
            trained: the states of the clients that upload, ``{client: state}``.
            names: the parameters that may travel; None: all that the method uploads.

        Returns:
            ``{client: state}`` as the coordinator decodes it, in the shapes of a state, for the clients that upload
            anything.
        """
        messages: dict[int, Message] = {}
        encoded: dict[int, ClientState] = {}
        for client, state in sorted(trained.items()):
            arrays: ClientState = self._pack(client, state, names)
            if not arrays:
                continue
            reference = self._pack(client, received[client], names)
            message = Message("upload", client, step, reference, dict(self.residuals.get(client, {})))
            for postprocessor in self.postprocessors:
                arrays = postprocessor.encode(arrays, message)
            self.traffic.upload += state_bytes(arrays)
            self.traffic.upload_payload += len(file_content(arrays))
            if message.residual:
                self.residuals[client] = message.residual
            messages[client], encoded[client] = message, arrays
        uploads: Mapping[int, ClientState] = encoded
        for postprocessor in reversed(self.postprocessors):
            uploads = postprocessor.decode_round(uploads, messages)
        return {client: self.packing.unpack(client, arrays) for client, arrays in uploads.items()}

    def download(
        self,
        step: int,
        client: int,
        received: ClientState,
        merged: ClientState,
        names: Sequence[str] | None = None,
        counted: bool = True,
    ) -> dict[str, np.ndarray]:
        """Carry the coordinator's answer to one client.

        Args:
            step: position of the stage in the run.
            client: number of the client.
            received: the state that the client started the round from.
            merged: the state that the coordinator computed for it.
            names: the parameters that may travel; None: all that the method uploads.
            counted: whether its bytes count; a client that did not upload is not answered in this round.

        Returns:
            The state that the client has afterwards.
        """
        if not counted and not self.postprocessors:
            return dict(merged)
        packed = self._pack(client, merged, names)
        if not packed:
            return dict(merged)
        message = Message("download", client, step, self._pack(client, received, names))
        arrays: ClientState = packed
        for postprocessor in self.postprocessors:
            arrays = postprocessor.encode(arrays, message)
        if counted:
            self.traffic.download += state_bytes(arrays)
            self.traffic.download_payload += len(file_content(arrays))
        for postprocessor in reversed(self.postprocessors):
            arrays = postprocessor.decode(arrays, message)
        return dict(merged) if arrays is packed else {**merged, **self.packing.unpack(client, arrays)}

    def _pack(self, client: int, state: ClientState, names: Sequence[str] | None) -> dict[str, np.ndarray]:
        packed = self.packing.pack(client, state)
        return packed if names is None else {name: value for name, value in packed.items() if name in names}

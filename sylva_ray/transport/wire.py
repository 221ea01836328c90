"""Between clients and coordinator: what travels, compressed, counted, and for some clients forged.

It knows no method: what an algorithm uploads is its `pack`. Both ends know what a client received, so updates travel, not states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.seeding import numpy_generator
from sylva_ray.core.types import ClientState, state_bytes
from sylva_ray.transport.byzantine import byzantine_clients, malicious_update
from sylva_ray.transport.codecs import create_codec, payload, transmit


@dataclass
class Traffic:
    """Bytes of one step: ``upload`` and ``download`` count the arrays, ``*_payload`` the files that hold them."""

    upload: int = 0
    upload_payload: int = 0
    download: int = 0
    download_payload: int = 0


class Packing(Protocol):
    """What the link has to know of a method: see `sylva_ray.federation.contract.Algorithm`."""

    def pack(self, client: int, state: ClientState) -> dict[str, np.ndarray]:
        """What ``client`` uploads of its ``state``."""
        ...

    def unpack(self, client: int, upload: ClientState) -> dict[str, np.ndarray]:
        """The upload in the shapes of a state."""
        ...

    def is_refactored(self, name: str) -> bool:
        """Whether merging rewrites this parameter in other coordinates."""
        ...


class Wire:
    """The link of every client. ``residuals {client: state}`` is what compression still owes; checkpoints keep it.

    Nothing is owed of factors that merging rewrites in other coordinates (``factor_rule=product_svd``): added there, what was
    lost here would be noise."""

    def __init__(self, config: ExperimentConfig, algorithm: Packing) -> None:
        self.config, self.algorithm = config, algorithm
        section = config.compression
        self.codec = None if section.kind == "none" else create_codec(section.kind, fraction=section.fraction)
        self.compresses_download = self.codec is not None and section.download and section.kind != "topk"
        self.attackers = byzantine_clients(config)
        self.residuals: dict[int, dict[str, np.ndarray]] = {}
        self.traffic = Traffic()

    def up(self, client: int, received: ClientState, trained: ClientState, names: Sequence[str] | None) -> ClientState:
        """What the coordinator holds of ``trained`` after the upload (in the shapes of a state); ``names`` None: all of it."""
        packed = _only(self.algorithm.pack(client, trained), names)
        if self.codec is None or not packed:
            self.traffic.upload += state_bytes(packed)
            self.traffic.upload_payload += len(payload(packed)) if packed else 0
            return self.algorithm.unpack(client, packed)
        before = _only(self.algorithm.pack(client, received), names)
        residual = self.residuals.get(client, {}) if self.config.compression.error_feedback else None
        sent = transmit(self.codec, _difference(packed, before), residual)
        if sent.residual is not None:
            owed = {name: value for name, value in sent.residual.items() if not self.algorithm.is_refactored(name)}
            self.residuals[client] = self.residuals.get(client, {}) | owed
        self.traffic.upload += sent.num_bytes
        self.traffic.upload_payload += sent.payload_bytes
        return self.algorithm.unpack(client, _sum(before, sent.decoded))

    def down(
        self,
        client: int,
        received: ClientState,
        merged: ClientState,
        names: Sequence[str] | None,
        counted: bool = True,
    ) -> dict[str, np.ndarray]:
        """The state that ``client`` holds after the coordinator's answer ``merged``."""
        packed = _only(self.algorithm.pack(client, merged), names)
        if not self.compresses_download or self.codec is None:
            size, file = state_bytes(packed), len(payload(packed)) if counted else 0
            state = dict(merged)
        else:
            before = _only(self.algorithm.pack(client, received), names)
            sent = transmit(self.codec, _difference(packed, before))
            size, file = sent.num_bytes, sent.payload_bytes
            state = {**merged, **self.algorithm.unpack(client, _sum(before, sent.decoded))}
        if counted:
            self.traffic.download += size
            self.traffic.download_payload += file
        return state

    def forged(
        self, round: int, uploads: Mapping[int, ClientState], received: Sequence[ClientState]
    ) -> dict[int, ClientState]:
        """The uploads with the attackers' replaced; they know everybody's update (the strongest case)."""
        section = self.config.byzantine
        liars = [client for client in self.attackers if client in uploads]
        if not liars:
            return dict(uploads)
        updates = {c: _difference(upload, received[c]) for c, upload in uploads.items()}
        benign = [updates[client] for client in sorted(updates) if client not in self.attackers]
        result = dict(uploads)
        for client in liars:
            rng = numpy_generator(self.config.seed, "forged", client, round)
            lie = malicious_update(
                section.attack, updates[client], benign, rng, len(uploads), len(liars), section.strength
            )
            told = _sum({name: received[client][name] for name in lie}, lie)
            result[client] = self.algorithm.unpack(client, self.algorithm.pack(client, told))  # no more than fits
        return result


def _only(packed: ClientState, names: Sequence[str] | None) -> dict[str, np.ndarray]:
    return {name: value for name, value in packed.items() if names is None or name in names}


def _difference(now: ClientState, before: ClientState) -> dict[str, np.ndarray]:
    return {name: value - before[name] for name, value in now.items()}


def _sum(before: ClientState, update: ClientState) -> dict[str, np.ndarray]:
    return {name: (before[name] + value).astype(before[name].dtype) for name, value in update.items()}

"""Digests of the data of a fleet, by which a later command recognises that the files on disk have changed.

A digest is made of what a run computes with: pixels after decoding and resizing, labels, class names, and the images of
each client. It therefore does not depend on where the files are, on the machine, or on the types of the arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from sylva_ray.core.types import Split
from sylva_ray.data.datasets import Dataset
from sylva_ray.data.fleet import ClientIndices, FleetData


@dataclass(frozen=True)
class DataDigest:
    """The SHA-256 digests of the parts of a fleet's data, each as 64 hexadecimal digits.

    Attributes:
        train: pixels and labels of the training half, in their order.
        test: pixels and labels of the test half, in their order.
        class_names: the names of the classes, in the order of their labels.
        partition: which images each client holds in each of its four splits, in the order of the clients.
    """

    train: str
    test: str
    class_names: str
    partition: str

    def differences(self, other: DataDigest) -> tuple[str, ...]:
        """Return the names of the parts that differ from those of ``other``, in the order of the attributes."""
        names = (field.name for field in fields(self))
        return tuple(name for name in names if getattr(self, name) != getattr(other, name))


def data_digest(fleet: FleetData) -> DataDigest:
    """Digest the data of all clients; takes about a second per gigabyte of pixels.

    Args:
        fleet: the data.

    Returns:
        One digest per part.
    """
    return DataDigest(**dataset_digests(fleet.dataset), partition=_partition_digest(fleet.clients))


def dataset_digests(dataset: Dataset) -> dict[str, str]:
    """Return the digests of a data set that is not divided, ``{part: digest}``; the parts are those of `DataDigest`."""
    return {
        "train": _split_digest(dataset.train),
        "test": _split_digest(dataset.test),
        "class_names": _names_digest(dataset.class_names),
    }


def _split_digest(split: Split) -> str:
    digest = hashlib.sha256()
    _add(digest, split.images, "u1")
    _add(digest, split.labels, "<i8")
    return digest.hexdigest()


def _names_digest(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        encoded = name.encode(errors="surrogatepass")
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()


def _partition_digest(clients: Sequence[ClientIndices]) -> str:
    digest = hashlib.sha256()
    for client in clients:
        for field in fields(client):
            _add(digest, getattr(client, field.name), "<i8")
    return digest.hexdigest()


def _add(digest: hashlib._Hash, array: np.ndarray, dtype: str) -> None:
    """Add the shape of an array and its values, of type ``dtype``, to a digest."""
    values = np.ascontiguousarray(array, dtype)
    digest.update(f"{values.shape}".encode())
    digest.update(values.reshape(-1).data)

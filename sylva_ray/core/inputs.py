"""``inputs.json``: digests of the data and the weights that a run computes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from sylva_ray.core.records import Artefact

WORDS = {
    "train": "the training images",
    "test": "the test images",
    "class_names": "the class names",
    "partition": "the division of the images among the clients",
    "backbone": "the weights of the backbone",
    "auxiliary": "the weights of the method's teacher",
}
"""What the digests are of, for messages."""


class Inputs(Artefact):
    """``inputs.json``, written before the first round; later commands compare what they load with it."""

    description: ClassVar[str] = "the inputs of a run"

    version: str
    """Version of this package at the start of the run."""
    data: dict[str, str] = Field({})
    """Digests of ``train`` and ``test`` (pixels and labels, in order), ``class_names`` and ``partition``."""
    weights: dict[str, str] = Field({})
    """Digests of ``backbone`` (all arrays but its head) and, where a method has a teacher, ``auxiliary``."""

    def differences(self, now: Inputs) -> list[str]:
        """Return what differs from ``now``, in words; what one of the two does not have is not compared."""
        pairs: list[tuple[Mapping[str, str], Mapping[str, str]]] = [(self.data, now.data), (self.weights, now.weights)]
        return [
            WORDS.get(name, name)
            for before, after in pairs
            for name in before
            if name in after and before[name] != after[name]
        ]

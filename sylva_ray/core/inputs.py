"""``inputs.json``: digests of the data and the weights that a run computes with."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sylva_ray.core.records import Artefact

DATA = {
    "train": "the training images",
    "test": "the test images",
    "class_names": "the class names",
    "partition": "the division among the clients",
}
"""What the digests of the data are of, in words."""

WEIGHTS = {"backbone": "the weights of the backbone", "auxiliary": "the weights of the teacher"}
"""What the digests of weights are of, in words."""


class Inputs(Artefact):
    """``inputs.json``, written before the first round; later commands compare what they load with it."""

    description: ClassVar[str] = "the inputs of a run"

    version: str
    """Version of this package at the start of the run."""
    data: dict[str, str] = Field({})
    """Digests of ``train`` and ``test`` (pixels and labels, in order), ``class_names`` and ``partition``."""
    weights: dict[str, str] = Field({})
    """Digests of ``backbone`` (all arrays but its head) and, where a method has a teacher, ``auxiliary``."""

    def changed_data(self, now: Inputs) -> list[str]:
        """Return which data differ from those of ``now``, in words; what one of the two lacks is not compared."""
        return _changed(self.data, now.data, DATA)

    def changed_weights(self, now: Inputs) -> list[str]:
        """Return which weights differ, likewise."""
        return _changed(self.weights, now.weights, WEIGHTS)


def _changed(before: dict[str, str], now: dict[str, str], words: dict[str, str]) -> list[str]:
    return [words.get(name, name) for name in before if name in now and before[name] != now[name]]

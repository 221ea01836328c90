"""Data and backbone of several experiments in the object store: what is equal is there once for all of them.

The trials of a sweep mostly differ in other settings than the data set. Each divides it among clients by itself, which
are a few indices; the images and the weights come from here, by their digests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sylva_ray.core.types import stack_digest
from sylva_ray.data.datasets import Dataset
from sylva_ray.data.fleet import ClientIndices, FleetData
from sylva_ray.preparation.experiment import Prepared


@dataclass(frozen=True)
class FleetReference:
    """The data of a fleet whose images are in the object store.

    Attributes:
        dataset: reference to the images of all. Ray passes references inside a dataclass on as references.
        clients: the indices of each client.
    """

    dataset: ray.ObjectRef[Dataset]
    clients: tuple[ClientIndices, ...]

    def load(self) -> FleetData:
        """Return the data; the arrays are read-only views of the object store of this node."""
        return FleetData(ray.get(self.dataset), self.clients)


class SharedInputs:
    """Owns objects in the store for as long as it lives; `RemoteSharedInputs` starts it."""

    def __init__(self) -> None:
        self._references: dict[str, ray.ObjectRef[Any]] = {}

    def find(self, key: str) -> list[ray.ObjectRef[Any]]:
        """Return the reference to an object, in a list, so that Ray passes on the reference; empty: it is not here."""
        return [self._references[key]] if key in self._references else []

    def add(self, key: str, value: Any) -> list[ray.ObjectRef[Any]]:
        """Keep an object, if none of this key is here, and return what `find` returns."""
        if key not in self._references:
            self._references[key] = ray.put(value)
        return self.find(key)

    def keys(self) -> list[str]:
        """Return the keys of all objects."""
        return list(self._references)


RemoteSharedInputs: Any = ray.remote(num_cpus=0)(SharedInputs)
"""`SharedInputs` as a Ray actor."""


def share_inputs() -> ActorHandle[Any]:
    """Start a `SharedInputs` on the node of this process, which is not one of the spot market."""
    own_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    handle: ActorHandle[Any] = RemoteSharedInputs.options(scheduling_strategy=own_node).remote()
    return handle


@dataclass(frozen=True)
class PutInputs:
    """References to the inputs of an experiment, as `sylva_ray.execution.ray.pool.RayPool` takes them.

    Attributes:
        fleet: of the data of all clients.
        backbone: of the arrays of the backbone.
    """

    fleet: ray.ObjectRef[FleetData] | ray.ObjectRef[FleetReference]
    backbone: ray.ObjectRef[dict[str, np.ndarray]]


def put_inputs(prepared: Prepared, shared: ActorHandle[Any] | None = None) -> PutInputs:
    """Put the inputs of an experiment into the object store.

    Args:
        prepared: the experiment.
        shared: a `SharedInputs`; None, or one that is lost: the inputs are put for this experiment alone.
    """
    if shared is not None:
        try:
            dataset, weights = prepared.fleet.dataset, prepared.backbone
            images = _put_once(shared, f"data/{_dataset_digest(dataset)}", dataset)
            backbone = _put_once(shared, f"backbone/{stack_digest(weights).hex()}", weights)
            return PutInputs(ray.put(FleetReference(images, prepared.fleet.clients)), backbone)
        except RayActorError:
            pass
    return PutInputs(ray.put(prepared.fleet), ray.put(prepared.backbone))


def _put_once(shared: ActorHandle[Any], key: str, value: Any) -> ray.ObjectRef[Any]:
    found: list[ray.ObjectRef[Any]] = ray.get(shared.find.remote(key)) or ray.get(shared.add.remote(key, value))
    return found[0]


def _dataset_digest(dataset: Dataset) -> str:
    """Return a digest of everything in a data set: name, classes, notices, images and labels."""
    halves = {"train": dataset.train, "test": dataset.test}
    arrays = {f"{name}/{part}": getattr(half, part) for name, half in halves.items() for part in ("images", "labels")}
    texts = repr((dataset.name, dataset.class_names, dataset.notices)).encode()
    return stack_digest({**arrays, "texts": np.frombuffer(texts, np.uint8)}).hex()

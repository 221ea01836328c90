"""Estimate the bytes that a run sends, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.types import ClientState, state_bytes
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.summary import DeclaredTraffic
from sylva_ray.preparation.sketch import Sketch, sketch_experiment
from sylva_ray.transport.postprocessor import Direction


@dataclass(frozen=True)
class TrafficEstimate:
    """The bytes that a run sends, from its configuration alone.

    Attributes:
        config: the experiment.
        data_bytes: pixels, labels and the clients' indices; sent to every node once.
        backbone_bytes: backbone and auxiliary weights; sent to every node once.
        state_bytes: the state of one client.
        upload_bytes: per client and round of phase 1.
        download_bytes: likewise.
    """

    config: ResolvedConfig
    data_bytes: int
    backbone_bytes: int
    state_bytes: int
    upload_bytes: int
    download_bytes: int

    @property
    def broadcast_bytes(self) -> int:
        """Bytes that are sent once to every node with an actor."""
        return self.data_bytes + self.backbone_bytes


def estimate_traffic(config: ExperimentConfig) -> TrafficEstimate:
    """Estimate the traffic of a run. No weights are loaded from the hub, and no data set is downloaded.

    Raises:
        UserError: the configuration cannot run.
    """
    return traffic_of(sketch_experiment(config))


def traffic_of(sketch: Sketch) -> TrafficEstimate:
    """Return the traffic of a run whose model has been built."""
    config, size = sketch.config, sketch.size
    traffic = declared_traffic(config, sketch.algorithm, sketch.states, sketch.full_model_bytes)
    indices = 8 * (size.num_train + config.partition.num_clients * config.partition.test_samples)
    return TrafficEstimate(
        config,
        data_bytes=size.num_bytes + indices,
        backbone_bytes=sketch.backbone_bytes,
        state_bytes=max(map(state_bytes, sketch.states)),
        upload_bytes=traffic.upload,
        download_bytes=traffic.download,
    )


def declared_traffic(
    config: ExperimentConfig, algorithm: Algorithm, states: Sequence[ClientState], full_model: int
) -> DeclaredTraffic:
    """Return the bytes per client and round of phase 1 that a method declares; the mean if clients differ.

    Args:
        config: the experiment.
        algorithm: the method, bound to its model.
        states: what the clients start from.
        full_model: bytes of the full model.
    """
    postprocessors = algorithm.postprocessors(config)
    packed = [algorithm.pack(client, state) for client, state in enumerate(states)]

    def mean(direction: Direction) -> int:
        sizes = []
        for state in packed:
            size = state_bytes(state)
            for postprocessor in postprocessors if state else ():
                size = postprocessor.num_bytes(size, state, direction)
            sizes.append(size)
        return round(sum(sizes) / len(sizes))

    return DeclaredTraffic(mean("upload"), mean("download"), full_model)

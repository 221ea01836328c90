"""An experiment's model and states from its configuration alone: no data set is read, and no weights are downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.types import ClientState
from sylva_ray.data.datasets import DatasetSize, measure_dataset
from sylva_ray.federation.client.worker import AUXILIARY, cohort_model
from sylva_ray.federation.contract import Algorithm
from sylva_ray.models.availability import check_available
from sylva_ray.models.cohort import FunctionalStack, full_model_bytes
from sylva_ray.preparation.experiment import check_byzantine, initial_states, with_parameters
from sylva_ray.preparation.resolve import resolve_config

if TYPE_CHECKING:
    from sylva_ray.models.lora import LoraStack


@dataclass(frozen=True)
class Sketch:
    """What can be known of an experiment before its data and its weights are there.

    Attributes:
        asked: the experiment.
        config: the same, resolved without measurements.
        algorithm: the method, bound to the model.
        model: on the CPU; its pre-trained weights are random.
        states: what the K clients start from.
        size: of the data set.
        backbone_bytes: of the backbone and of auxiliary weights.
        full_model_bytes: of the whole model in float32.
    """

    asked: ExperimentConfig
    config: ResolvedConfig
    algorithm: Algorithm
    model: LoraStack | FunctionalStack
    states: Sequence[ClientState]
    size: DatasetSize
    backbone_bytes: int
    full_model_bytes: int


def sketch_experiment(config: ExperimentConfig) -> Sketch:
    """Build the model of an experiment and the states of its clients.

    Raises:
        UserError: the configuration cannot run.
    """
    algorithm = create_algorithm(config.algorithm)
    check_byzantine(config, algorithm)
    check_available(config.backbone)
    resolved = resolve_config(config)
    resolved = resolved.model_copy(update={"algorithm": with_parameters(config).algorithm})

    from sylva_ray.models.backbone import backbone_arrays, create_backbone  # timm: after what needs no model

    section = config.backbone.model_copy(update={"pretrained": False})
    size = measure_dataset(config.dataset, create_backbone(section, num_classes=2).image_size)
    backbone = create_backbone(section, size.num_classes)
    arrays = backbone_arrays(backbone)
    arrays |= {AUXILIARY + n: value for n, value in algorithm.auxiliary_weights(size.num_classes).items()}
    full_model = full_model_bytes(backbone)  # before it becomes a part of the clients' model
    num_bytes = sum(array.nbytes for array in arrays.values())
    model = cohort_model(algorithm, resolved, backbone)
    states = initial_states(algorithm, model, config, size.num_classes, arrays)
    return Sketch(config, resolved, algorithm, model, states, size, num_bytes, full_model)

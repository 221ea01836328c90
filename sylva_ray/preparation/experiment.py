"""Make an experiment ready to run: from a configuration to data, backbone and method. Nothing is written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sylva_ray.aggregation.neighbours import neighbourhood_size
from sylva_ray.aggregation.robust import assumed_byzantine, check_rule, min_clients
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.attacks import check_classes
from sylva_ray.config.experiment import BackboneSection, ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.config.stored import with_choices_of
from sylva_ray.core.errors import UserError
from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ClientState
from sylva_ray.data.datasets import find_dataset, load_dataset
from sylva_ray.data.fleet import FleetData, build_fleet, divide
from sylva_ray.federation.client.worker import AUXILIARY, CohortWorker, cohort_model, split_weights
from sylva_ray.federation.contract import Algorithm, stages_of_run
from sylva_ray.metrics.checks import UNBOUNDED
from sylva_ray.models.availability import check_available
from sylva_ray.models.cohort import CohortModel
from sylva_ray.preparation.assumptions import assumptions
from sylva_ray.preparation.memory import plan_windows
from sylva_ray.preparation.resolve import check_device, kernels_of, measure_choices, resolve_config
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.transport.byzantine import byzantine_clients


@dataclass(frozen=True)
class BackboneFacts:
    """What a timm model says of itself.

    Attributes:
        image_size: side in pixels of what it sees.
        head_name: name of its final layer.
    """

    image_size: int
    head_name: str


@dataclass(frozen=True)
class Prepared:
    """A validated experiment, ready to be sent to a cluster.

    Attributes:
        config: the experiment.
        fleet: the data of all clients.
        backbone: the timm model's state_dict as numpy arrays, and a method's auxiliary weights (`split_weights`).
        setup_seconds: how long the preparation took.
        changed_inputs: data and weights that are not those that the run began with, in words.
        facts: of the backbone; None in a coordinator, which does not need them.
        notices: what was assumed of GPUs that are not on this machine, in words.
    """

    config: ResolvedConfig
    fleet: FleetData
    backbone: dict[str, np.ndarray]
    setup_seconds: float
    changed_inputs: tuple[str, ...] = ()
    facts: BackboneFacts | None = None
    notices: tuple[str, ...] = ()


def prepare(config: ExperimentConfig, folder: RunFolder | None = None, measure: bool = True) -> Prepared:
    """Load the data and the backbone, partition the images, and check everything that can be checked before a run.

    What needs less is checked first: settings, files and labels, then the model, and last what needs images.

    Args:
        config: the experiment.
        folder: of the run. If it holds a run, that run's choices replace ``auto``.
        measure: whether to measure which precision and attention kernel are fastest; without it, ``auto`` is float32
            and the fused kernel.

    Raises:
        UserError: the configuration cannot run; names the key, its value and what to do.
    """
    started = time.perf_counter()
    is_new = not isinstance(config, ResolvedConfig) and (folder is None or not folder.config_file.exists())
    if folder is not None and folder.config_file.exists():
        config = with_choices_of(config, folder.load_config())
    algorithm = create_algorithm(config.algorithm)
    check_rule(algorithm.parameters.robust.rule)
    check_byzantine(config, algorithm)
    if config.cluster.address is None:
        check_device(config.training.device)
    check_available(config.backbone)
    for key, value in algorithm.parameters:
        if isinstance(value, BackboneSection):
            check_available(value, f"algorithm.{key}")
    files = find_dataset(config.dataset)
    labels = files.labels(config.seed, config.partition.leftovers)
    clients = divide(labels, config.partition, config.seed)
    num_classes = len(labels.class_names)
    if is_new:
        check_attacks(config, num_classes)
    resolved = resolve_config(config)
    stages = stages_of_run(algorithm, resolved)  # checks their order, before anything is loaded

    from sylva_ray.models.backbone import backbone_arrays, create_backbone  # timm: after what needs no model
    from sylva_ray.models.trial import try_model

    backbone = create_backbone(config.backbone, num_classes)
    facts = BackboneFacts(backbone.image_size, backbone.head_name)
    # copies: batch normalisation counts its batches in place
    arrays = {name: np.array(value) for name, value in backbone_arrays(backbone).items()}
    arrays |= {AUXILIARY + n: value for n, value in algorithm.auxiliary_weights(num_classes).items()}
    model = cohort_model(algorithm, resolved, backbone)
    for stage in stages:
        stage.check(model)
    states = initial_states(algorithm, model, resolved, num_classes, arrays)
    check_compression(config, states[0])
    fleet = FleetData(files.load(facts.image_size, config.seed, config.partition.leftovers), clients)
    try_model(model, states[0], fleet.dataset.image_size, config.backbone, config.lora, split_weights(arrays)[0])
    resolved = measure_choices(config, resolved, model, states, fleet.dataset.image_size, measure)
    if measure:
        model.kernels = resolved.training.attention
        resolved = plan_windows(config, resolved, algorithm, model, states, fleet)
    notices = assumptions(config, resolved)
    resolved = resolved.model_copy(update={"algorithm": with_parameters(config).algorithm})
    return Prepared(resolved, fleet, arrays, time.perf_counter() - started, facts=facts, notices=notices)


def check_attacks(config: ExperimentConfig, num_classes: int) -> None:
    """Check that the attacks of the evaluation can be made, and that none has the name of that of check S4.

    Raises:
        UserError: an attack needs more classes, or is that of the check.
    """
    key = "evaluation.attacks"
    check_classes(config.evaluation.specs, num_classes, key)
    if any(spec.label == UNBOUNDED.label for spec in config.evaluation.specs):
        raise UserError(key, UNBOUNDED.label, "is what check S4 measures; choose other steps or another epsilon")


def load_fleet(config: ExperimentConfig, image_size: int) -> FleetData:
    """Load the images of an experiment and divide them among its clients.

    Args:
        config: the experiment.
        image_size: side in pixels of what the backbone sees.

    Raises:
        UserError: the data cannot be read, or the division is impossible.
    """
    dataset = load_dataset(config.dataset, image_size, config.seed, config.partition.leftovers)
    return build_fleet(dataset, config.partition, config.seed)


def with_parameters(config: ExperimentConfig) -> ExperimentConfig:
    """Return an experiment with all parameters of its method, those with a default, too.

    Raises:
        UserError: the method is unknown, or a parameter is wrong.
    """
    parameters = create_algorithm(config.algorithm).parameters
    if parameters.robust.assumed_fraction is None:
        robust = parameters.robust.model_copy(update={"assumed_fraction": config.byzantine.fraction})
        parameters = parameters.model_copy(update={"robust": robust})
    section = config.algorithm.model_copy(update=parameters.model_dump(mode="json"))
    return config.model_copy(update={"algorithm": section})


def as_stored(config: ExperimentConfig, stored: ExperimentConfig) -> ExperimentConfig:
    """Resolve an experiment with the choices of ``stored``, of a run folder, for every ``auto``; load nothing.

    Raises:
        UserError: the method is unknown, or a parameter is wrong.
    """
    config = with_choices_of(with_parameters(config), stored)
    attention = config.training.attention
    if attention == "auto":
        return config
    training = config.training.model_copy(update={"attention": kernels_of(attention)})
    return config.model_copy(update={"training": training})


def initial_states(
    algorithm: Algorithm,
    model: CohortModel,
    config: ExperimentConfig,
    num_classes: int,
    weights: Mapping[str, np.ndarray],
) -> list[dict[str, np.ndarray]]:
    """Bind a method to its model, and return what the clients start from.

    Args:
        algorithm: the method.
        model: the model that clients train, on the CPU.
        config: the experiment.
        num_classes: classes of the data.
        weights: as in `Prepared.backbone`.

    Returns:
        K states.

    Raises:
        UserError: the method cannot run on this model or with these epochs.
    """
    algorithm.bind_model(model, num_classes, split_weights(weights)[1], torch.device("cpu"))
    common = model.initial_state(generator(config.seed, "initial state"))
    trained = [name for name in common if model.trainable(name) and algorithm.is_trained(name)]
    algorithm.schedule(config.training.local_epochs, trained)
    return [algorithm.initial_state(client, common) for client in range(config.partition.num_clients)]


def check_compression(config: ExperimentConfig, state: ClientState) -> None:
    """Check that what travels can be coded with losses.

    Raises:
        UserError: the state of a client has statistics of batch normalisation, and a variance could become negative.
    """
    name = next((name for name in state if name.endswith("running_var")), None)
    if config.compression.kind != "none" and name is not None:
        fix = f"cannot code the statistics of batch normalisation ({name}); use algorithm.model=lora, or none"
        raise UserError("compression.kind", config.compression.kind, fix)


def check_byzantine(config: ExperimentConfig, algorithm: Algorithm) -> None:
    """Check that the method's robust rule tolerates as many Byzantine clients as it assumes, wherever it merges.

    Raises:
        UserError: there are too many of them, so the rule would merge nothing in any round.
    """
    num_clients = config.partition.num_clients
    if config.byzantine.fraction > 0 and not byzantine_clients(config):
        fix = f"is less than 1 of {num_clients} clients; {math.ceil(1000 / num_clients) / 1000:g} is one"
        raise UserError("byzantine.fraction", config.byzantine.fraction, fix)
    p = algorithm.parameters
    partners = p.mixture.partners or () if p.mixture.enabled and p.final_local_epochs else ()
    sharing = {p.adapters, p.heads, *partners} - {"local"}
    if p.robust.rule == "mean" or not sharing:
        return
    key, fraction = "algorithm.robust.assumed_fraction", p.robust.assumed_fraction
    if fraction is None:
        key, fraction = "byzantine.fraction", config.byzantine.fraction
    everyone = config.training.clients_per_round or config.partition.num_clients
    merged = [(everyone, "uploads")]
    if "neighbours" in sharing:
        merged.append((neighbourhood_size(everyone, p.num_neighbours), "neighbours (algorithm.num_neighbours)"))
    for members, senders in merged:
        num_byzantine = assumed_byzantine(fraction, members)
        needed, condition = min_clients(p.robust.rule, num_byzantine)
        inputs = p.robust.num_inputs(members)
        if inputs < needed:
            what = f"{members} {senders}" + (f" in {inputs} buckets" if inputs < members else "")
            assumed = f"assumes that {num_byzantine} are Byzantine"
            fix = f"{p.robust.rule} needs {condition}; here it merges {what} and {assumed}"
            raise UserError(key, fraction, fix)


def create_worker(config: ResolvedConfig, fleet: FleetData, backbone: Mapping[str, np.ndarray]) -> CohortWorker:
    """Create a worker for the method that ``config`` names; ``backbone`` as in `Prepared`."""
    return CohortWorker(create_algorithm(config.algorithm), config, fleet, backbone)

"""One experiment, wired: config to data, backbone and algorithm; rounds to records, summary, report and adapters.

`prepare` validates everything and writes nothing. `run_experiment` is idempotent: called again on the same run folder it
goes on from the newest checkpoint, whoever died in between.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from sylva_ray.aggregation.byzantine import attackers_of
from sylva_ray.aggregation.compression import create_codec, shapes_of
from sylva_ray.aggregation.neighbours import neighbourhood_size
from sylva_ray.aggregation.robust import assumed_bad, least_clients
from sylva_ray.algorithms.base import Algorithm
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.client.worker import COMPANION, build_model, split_weights
from sylva_ray.config import CONFIG, ExperimentConfig, load_run_config
from sylva_ray.coordinator.checkpoint import CheckpointFolder
from sylva_ray.coordinator.cohorts import resolve_cohort_size
from sylva_ray.coordinator.pool import ClientPool
from sylva_ray.coordinator.remote_folder import RemoteFolder
from sylva_ray.coordinator.rounds import Record, Rounds
from sylva_ray.data.datasets import load_dataset, measure_dataset
from sylva_ray.data.fleet import FleetData, build_fleet
from sylva_ray.errors import RunError, UserError
from sylva_ray.evaluation.summary import DeclaredTraffic, summarise
from sylva_ray.models.backbone import backbone_arrays, create_backbone
from sylva_ray.models.cohort import CohortModel, FunctionalStack, full_model_bytes, to_parameters
from sylva_ray.models.compute_choice import ComputeChoice, can_run, fastest
from sylva_ray.models.lora import LoraStack
from sylva_ray.models.peft_format import save_adapter, save_merged
from sylva_ray.seeding import generator
from sylva_ray.tracking.jsonl import rewrite_records
from sylva_ray.tracking.mlflow_tracker import RunFollower
from sylva_ray.types import ClientState, stack_states, state_bytes

RECORDS, SUMMARY = "rounds.jsonl", "summary.json"


@dataclass(frozen=True)
class Prepared:
    """A validated experiment, ready to be sent to a cluster. ``config`` has no ``auto`` left but ``cluster.num_actors``.

    ``backbone`` is the timm model's state_dict as numpy arrays, a companion's beside it (`split_weights`)."""

    config: ExperimentConfig
    fleet: FleetData
    backbone: dict[str, np.ndarray]
    setup_seconds: float


def prepare(config: ExperimentConfig, run_dir: Path | None = None) -> Prepared:
    """Load data and backbone, deal the images, try everything that could be wrong. Nothing is written.

    Args:
        config: every ``auto`` that the result depends on becomes a value.
        run_dir: where the run goes. If it holds one already, what that run chose for an ``auto`` is chosen again.

    Raises:
        UserError: anything about the config that cannot run: one line with key, value and what to do.
    """
    started = time.perf_counter()
    if run_dir is not None and (run_dir / CONFIG).exists():
        config = _with_choices_of(config, load_run_config(run_dir))
    config = _resolve(config)
    algorithm = create_algorithm(config.algorithm)
    check_byzantine(config, algorithm)
    image_size = create_backbone(config.backbone, num_classes=2).image_size
    fleet = build_fleet(load_dataset(config.dataset, image_size, config.seed), config.partition, config.seed)
    arrays = backbone_arrays(create_backbone(config.backbone, fleet.num_classes))
    arrays |= {COMPANION + n: value for n, value in algorithm.companion_weights(fleet.num_classes).items()}
    model = build_model(config, fleet.num_classes, arrays)
    states = meet(algorithm, model, config, fleet.num_classes, arrays)
    config = _with_compute_choice(config, model, states, fleet.dataset.train.images.shape[-1])
    phase2 = algorithm.parameters.phase2
    if phase2.enabled and phase2.selection == "shift" and isinstance(model, LoraStack) and model.num_blocks is None:
        fix = "needs a plain chain of transformer blocks, every one with adapters; use shapley"
        raise UserError("algorithm.phase2.selection", "shift", fix)
    parameters = algorithm.parameters
    if parameters.robust.assumed_fraction is None:
        robust = parameters.robust.model_copy(update={"assumed_fraction": config.byzantine.fraction})
        parameters = parameters.model_copy(update={"robust": robust})
    resolved = config.model_copy(
        update={"algorithm": config.algorithm.model_copy(update=parameters.model_dump(mode="json"))}
    )
    return Prepared(resolved, fleet, arrays, time.perf_counter() - started)


@dataclass(frozen=True)
class Weight:
    """What a run moves, in bytes, from its config alone; ``config`` is resolved.

    ``data_bytes`` (pixels, labels, and who holds which) and ``backbone_bytes`` go to every node once, ``state_bytes`` is one
    client's, ``upload_bytes`` and ``download_bytes`` are per client and round of phase 1."""

    config: ExperimentConfig
    data_bytes: int
    backbone_bytes: int
    state_bytes: int
    upload_bytes: int
    download_bytes: int

    @property
    def broadcast_bytes(self) -> int:
        """Sent to every node that has an actor."""
        return self.data_bytes + self.backbone_bytes


def weigh(config: ExperimentConfig) -> Weight:
    """Reckon before anything is loaded: no weights from the hub, no data set that torchvision would download.

    Raises:
        UserError: the config cannot run.
    """
    config = _resolve(config)
    algorithm = create_algorithm(config.algorithm)
    check_byzantine(config, algorithm)
    section = config.backbone.model_copy(update={"pretrained": False})
    size = measure_dataset(config.dataset, create_backbone(section, num_classes=2).image_size)
    backbone = create_backbone(section, size.num_classes)
    arrays = backbone_arrays(backbone)
    arrays |= {COMPANION + n: value for n, value in algorithm.companion_weights(size.num_classes).items()}
    untrained = config.model_copy(update={"backbone": section})
    states = meet(algorithm, build_model(untrained, size.num_classes, arrays), config, size.num_classes, arrays)
    traffic = declared_traffic(config, algorithm, states, full_model_bytes(backbone))
    indices = 8 * (size.num_train + config.partition.num_clients * config.partition.test_samples)
    return Weight(
        config,
        data_bytes=size.num_bytes + indices,
        backbone_bytes=sum(array.nbytes for array in arrays.values()),
        state_bytes=max(map(state_bytes, states)),
        upload_bytes=traffic.upload,
        download_bytes=traffic.download,
    )


def claim_run_folder(run_dir: Path, config: ExperimentConfig, resume: bool) -> None:
    """Make the run folder ours: write ``config.yaml``, or check that the one there describes the same experiment.

    Only ``cluster`` (but its threads) and ``tracking`` may differ on resume: they do not change the result.

    Raises:
        UserError: the folder holds a run and ``resume`` is false, or another config, or cannot be written.
    """
    path = run_dir / CONFIG
    if path.exists():
        present = load_run_config(run_dir)
        if not resume:
            raise UserError(
                "--out", str(run_dir), "already holds a run; add --resume to continue it, or choose another"
            )
        difference = _difference(present, config)
        if difference:
            raise UserError("--out", str(run_dir), f"holds a run with another config ({difference})")
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise UserError("--out", str(run_dir), "is not empty and holds no run; choose another folder")
    elif resume:
        raise UserError("--resume", str(run_dir), "holds no run to resume")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(config.to_yaml())
    except OSError as error:
        raise UserError("--out", str(run_dir), f"cannot be written ({error.strerror})") from None


@threadpool_limits.wrap(limits=1, user_api="blas")
def run_experiment(
    prepared: Prepared,
    run_dir: Path,
    pool: ClientPool,
    on_event: Callable[[dict[str, Any]], None],
    remote: RemoteFolder | None = None,
) -> dict[str, Any]:
    """Run (or go on with) the experiment and return its summary, which is also written. ``remote`` gets a copy after every step.

    Numpy's linear algebra runs on one thread: the last bits of a QR or an SVD depend on the number of threads, which differs
    between a Ray actor, a plain process and another machine; the matrices are small, so one thread is also the fastest.

    Raises:
        RunError: a failure while running; the run folder can be resumed.
    """
    config, fleet = prepared.config, prepared.fleet
    algorithm = create_algorithm(config.algorithm)
    model = build_model(config, fleet.num_classes, prepared.backbone)
    initial = meet(algorithm, model, config, fleet.num_classes, prepared.backbone)
    follower = RunFollower(run_dir, config) if config.tracking.enabled else None

    def on_record(records: list[Record]) -> None:
        rewrite_records(run_dir / RECORDS, records)
        if follower is not None:
            follower.notify()
        if remote is not None:
            try:
                remote.push()
            except RunError as error:  # the next step brings it along; the end insists
                on_event({"event": "unsaved", "reason": str(error)})

    rounds = Rounds(
        config,
        algorithm,
        fleet,
        initial,
        model.players if isinstance(model, LoraStack) else {},
        pool,
        run_dir,
        on_record,
        on_event,
    )
    status = "FAILED"
    try:
        rounds.run()
        on_event({"event": "finishing"})
        from sylva_ray.tracking.report.build import write_report  # matplotlib: the first step need not wait for it

        if isinstance(model, LoraStack):
            export_clients(config, rounds.states, range(fleet.num_clients), run_dir / "adapters")
        summary = summarise(
            config,
            fleet,
            rounds.records,
            rounds.game,
            declared_traffic(
                config,
                algorithm,
                initial,
                full_model_bytes(
                    create_backbone(config.backbone, fleet.num_classes, split_weights(prepared.backbone)[0])
                ),
            ),
            pool.num_actors,
            prepared.setup_seconds,
        )
        write_summary(run_dir, summary)
        write_report(run_dir)
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"  # a sweep prunes its trials so
        raise
    except OSError as error:
        raise RunError(f"{error.strerror or error} while writing to {run_dir}: make room, then resume") from error
    finally:
        warnings = follower.close(status, config.tracking.flush_timeout_s) if follower is not None else []
    if warnings:
        summary["warnings"] += warnings
        write_summary(run_dir, summary)
        write_report(run_dir)
    if remote is not None:
        remote.push()
    return summary


def meet(
    algorithm: Algorithm,
    model: CohortModel,
    config: ExperimentConfig,
    num_classes: int,
    weights: Mapping[str, np.ndarray],
) -> list[dict[str, np.ndarray]]:
    """Introduce the method to the model (on the CPU); returns what the clients start from.

    Raises:
        UserError: the method cannot run on this model or with these epochs."""
    algorithm.attach(model, num_classes, split_weights(weights)[1], torch.device("cpu"))
    common = model.initial_state(generator(config.seed, "initial state"))
    trained = [name for name in common if model.trainable(name) and algorithm.trains(name)]
    algorithm.schedule(config.training.local_epochs, trained)
    return [algorithm.initial_state(client, common) for client in range(config.partition.num_clients)]


def check_byzantine(config: ExperimentConfig, algorithm: Algorithm) -> None:
    """Whether the method's robust rule bears as many liars as it reckons with, wherever it merges.

    Raises:
        UserError: too many of them: the rule would refuse every round, and nobody would ever receive anything."""
    num_clients = config.partition.num_clients
    if config.byzantine.fraction > 0 and not attackers_of(config):
        fix = f"is none of {num_clients} clients; {math.ceil(1000 / num_clients) / 1000:g} is one"
        raise UserError("byzantine.fraction", config.byzantine.fraction, fix)
    p = algorithm.parameters
    sharing = {p.adapters, p.heads} - {"local"}
    if p.robust.rule == "mean" or not sharing:
        return
    key, fraction = "algorithm.robust.assumed_fraction", p.robust.assumed_fraction
    if fraction is None:
        key, fraction = "byzantine.fraction", config.byzantine.fraction
    everyone = config.training.clients_per_round or config.partition.num_clients
    merged = [(everyone, "uploads")]
    if "neighbours" in sharing:
        merged.append((neighbourhood_size(everyone, p.num_neighbours), "neighbours (algorithm.num_neighbours)"))
    for members, who in merged:
        num_bad = assumed_bad(fraction, members)
        needed, condition = least_clients(p.robust.rule, num_bad)
        inputs = math.ceil(members / p.robust.bucket_size)
        if inputs < needed:
            what = f"{members} {who}" + (f" in {inputs} buckets" if p.robust.bucket_size > 1 else "")
            raise UserError(
                key, fraction, f"{p.robust.rule} needs {condition}; here it merges {what}, {num_bad} of them bad"
            )


def declared_traffic(
    config: ExperimentConfig, algorithm: Algorithm, states: Sequence[ClientState], full_model: int
) -> DeclaredTraffic:
    """Bytes per client and round of phase 1, from what the method declares; the mean where clients differ."""
    plain, coded = [], []
    section = config.compression
    codec = None if section.kind == "none" else create_codec(section.kind, fraction=section.fraction)
    for client, state in enumerate(states):
        packed = algorithm.pack(client, state)
        plain.append(state_bytes(packed))
        coded.append(plain[-1] if codec is None or not packed else codec.num_bytes(shapes_of(packed)))
    upload = round(sum(coded) / len(coded))
    answers = upload if section.download and section.kind != "topk" else round(sum(plain) / len(plain))
    return DeclaredTraffic(upload, answers, full_model)


def export_clients(
    config: ExperimentConfig,
    states: Sequence[ClientState],
    clients: Iterable[int],
    folder: Path,
    merged: bool = False,
) -> list[Path]:
    """One PEFT adapter per client in ``folder/client_000/``, and with ``merged`` the whole model as ``model.safetensors``.

    Raises:
        UserError: the run trained full models, which have no adapters.
    """
    probe = create_backbone(config.backbone, num_classes=2)
    head_names = (f"{probe.head_name}.weight", f"{probe.head_name}.bias")
    backbone = create_backbone(config.backbone, len(states[0][head_names[1]]))
    if not any(name.endswith(".lora_A") for name in states[0]):
        raise UserError("algorithm.model", "full", "has no adapters to export")
    folders = []
    for client in clients:
        target = folder / f"client_{client:03d}"
        save_adapter(states[client], target, config.backbone, config.lora, head_names)
        if merged:
            save_merged(states[client], target, backbone_arrays(backbone), config.lora)
        folders.append(target)
    return folders


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Atomically, so that a reader never sees half of it."""
    draft = run_dir / f".{SUMMARY}"
    draft.write_text(json.dumps(summary, indent=1) + "\n")
    draft.replace(run_dir / SUMMARY)


def load_run(run_dir: Path) -> tuple[ExperimentConfig, list[dict[str, np.ndarray]]]:
    """Config and newest client states of a run folder.

    Raises:
        UserError: no such run, or nothing in it yet.
    """
    if not (run_dir / CONFIG).exists():
        raise UserError("RUN", str(run_dir), f"is no run folder (no {CONFIG} in it)")
    config = load_run_config(run_dir)
    checkpoint = CheckpointFolder(run_dir / "checkpoint").latest()
    if checkpoint is None:
        raise UserError("RUN", str(run_dir), "has no checkpoint yet")
    return config, checkpoint.states


def _resolve(config: ExperimentConfig) -> ExperimentConfig:
    """Every ``auto`` that the result depends on becomes a value."""
    device = config.training.device
    if device == "auto":
        cluster = config.cluster
        elsewhere = cluster.pool == "ray" and cluster.address is not None  # a cluster's head need not have a GPU itself
        wanted = cluster.gpus_per_actor > 0 or cluster.pool == "in_process"
        device = "cuda" if wanted and (elsewhere or torch.cuda.is_available()) else "cpu"
    elif device == "cuda" and not torch.cuda.is_available() and config.cluster.address is None:
        raise UserError("training.device", "cuda", "there is no GPU here; use cpu or auto")
    training = config.training.model_copy(update={"device": device, "cohort_size": resolve_cohort_size(config)})
    return config.model_copy(update={"training": training})


def _with_compute_choice(
    config: ExperimentConfig, model: CohortModel, states: Sequence[ClientState], image_size: int
) -> ExperimentConfig:
    """Precision and attention kernels as values: what was asked for, else what is fastest here for a cohort of this size.

    Where the run's device is not here (the GPU workers of a cluster whose head has none), nothing can be measured: float32 and
    fused attention.

    Raises:
        UserError: bfloat16 was asked for, and the model cannot run in it."""
    training, evaluation = config.training, config.evaluation
    device, size = torch.device(training.device), training.cohort_size
    choice = ComputeChoice("float32", config.attention_kernels, {})
    if device.type == "cpu" or torch.cuda.is_available():
        assert isinstance(size, int), "cohort_size is resolved"
        assert isinstance(model, LoraStack | FunctionalStack)
        model.backbone.to(device)
        params = to_parameters(stack_states(states[:size]), device, torch.float32)
        if "auto" in (training.precision, training.attention, evaluation.precision):
            choice = fastest(model, params, image_size, device, config.cluster.threads_per_actor)
        for key, asked in (("training", training.precision), ("evaluation", evaluation.precision)):
            if asked == "bfloat16" and not can_run(model, params, image_size, device, asked):
                fix = f"{config.backbone.name} cannot run in it; use float32 or auto"
                raise UserError(f"{key}.precision", asked, fix)
    attention = choice.attention if training.attention == "auto" else config.attention_kernels
    precisions = [
        choice.precision if asked == "auto" else asked for asked in (training.precision, evaluation.precision)
    ]
    return config.model_copy(
        update={
            "training": training.model_copy(update={"precision": precisions[0], "attention": attention}),
            "evaluation": evaluation.model_copy(update={"precision": precisions[1]}),
        }
    )


CHOICES = (
    ("training", "device"),
    ("training", "cohort_size"),
    ("training", "precision"),
    ("training", "attention"),
    ("evaluation", "precision"),
)
"""Keys whose ``auto`` is resolved, and which the result depends on."""


def _with_choices_of(config: ExperimentConfig, present: ExperimentConfig) -> ExperimentConfig:
    """``config`` with what the ``present`` run chose in place of ``auto``."""
    for section, key in CHOICES:
        if getattr(getattr(config, section), key) == "auto":
            chosen = getattr(getattr(present, section), key)
            config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: chosen})})
    return config


def _difference(present: ExperimentConfig, wanted: ExperimentConfig) -> str:
    """The first key that changes the result and differs, or ''. An ``auto`` that was never resolved accepts any choice."""
    a, b = _with_choices_of(present, wanted).flat(), wanted.flat()
    free = tuple(
        key for key in a | b if key.startswith(("cluster.", "tracking.")) and key != "cluster.threads_per_actor"
    )
    for key in sorted((a | b).keys() - set(free)):
        if a.get(key) != b.get(key):
            return f"{key}: {a.get(key, 'not set')} there, {b.get(key, 'not set')} now"
    return ""

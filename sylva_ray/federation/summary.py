"""Compute the summary of a finished run (`sylva_ray.core.summary`) from its records."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from sylva_ray.attacks.registry import find_attack
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.provenance import package_commit
from sylva_ray.core.records import ClientAccuracies, Compute, GameRecord, StageRecord
from sylva_ray.core.summary import (
    ByzantineRecord,
    CheckResult,
    ClientSummary,
    Communication,
    Hardware,
    RunSeconds,
    Spread,
    StageAccuracies,
    Summary,
)
from sylva_ray.core.text import clients_text
from sylva_ray.core.version import __version__
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.stages.kinds import is_exchange, phase_of
from sylva_ray.federation.threat_model import budget_warnings, threat_model
from sylva_ray.metrics.checks import S4_IMAGES, UNBOUNDED, collapse, is_collapsed, unbounded_attack
from sylva_ray.transport.byzantine import byzantine_clients


@dataclass(frozen=True)
class DeclaredTraffic:
    """Bytes by declaration: sizes of the arrays that a method names, before any encoding.

    Attributes:
        upload: of a client in a round of phase 1 (mean over clients).
        download: the same from the server to a client.
        full_model: size of the whole model in float32, which training the full model would upload.
    """

    upload: int
    download: int
    full_model: int


@dataclass(frozen=True)
class RunCosts:
    """The resources of a run.

    Attributes:
        traffic: bytes by declaration.
        num_actors: workers.
        setup_seconds: wall seconds of loading data and model.
        aggregates: whether the only worker is also the coordinator, so that it does not wait while that merges.
    """

    traffic: DeclaredTraffic
    num_actors: int
    setup_seconds: float
    aggregates: bool = False


def summarise(
    config: ResolvedConfig,
    fleet: FleetData,
    records: Sequence[StageRecord],
    game: GameRecord | None,
    costs: RunCosts,
) -> Summary:
    """Summarise a finished run; the tracker's warnings are added later.

    Args:
        config: of the run.
        fleet: for the numbers of images and the labels.
        records: of all stages; the last one has a full evaluation.
        game: the result of the layer game; None where none was played.
        costs: the resources of the run.
    """
    attackers = byzantine_clients(config)
    majority = [fleet.client(c).majority_share for c in range(fleet.num_clients)]
    final = records[-1].evaluation
    assert final is not None, "the last stage is evaluated"
    honest = [client for client in range(fleet.num_clients) if client not in attackers]
    collapsed = _collapsed(config, final, majority, attackers)
    checks = _checks(final, collapsed, fleet, attackers, honest) if config.evaluation.checks else []
    return Summary(
        name=config.name,
        algorithm=config.algorithm.name,
        dataset=config.dataset.name,
        backbone=config.backbone.name,
        num_clients=fleet.num_clients,
        num_classes=fleet.num_classes,
        seed=config.seed,
        rounds=config.training.rounds,
        class_names=list(fleet.dataset.class_names),
        label_matrix=fleet.label_matrix().tolist(),
        test_images=fleet.num_test_images(honest),
        clients=[
            ClientSummary(
                client=client,
                train=len(data.train),
                selection=len(data.selection),
                guard=len(data.guard),
                test=len(data.test),
                majority_share=majority[client],
                collapsed=bool(collapsed and collapsed[client]),
                byzantine=client in attackers,
            )
            for client, data in enumerate(fleet.clients)
        ],
        initial=_end_of_phase(0, records, attackers),
        phase1=_end_of_phase(1, records, attackers),
        final=_from_evaluation(final, attackers),
        majority=Spread.from_values(majority, attackers),
        communication=_communication(config, records, costs.traffic),
        layer_game=game,
        seconds=run_seconds(records, costs),
        peak_memory_bytes_per_actor=max(record.peak_memory_bytes for record in records),
        peak_gpu_memory_bytes_per_actor=max(record.peak_gpu_memory_bytes or 0 for record in records) or None,
        checks=checks,
        warnings=[
            *fleet.dataset.notices,
            *_warnings(records, checks),
            *budget_warnings(config, config.evaluation.specs, records),
        ],
        threat_model=threat_model(config, config.evaluation.specs, records),
        byzantine=ByzantineRecord(attack=config.byzantine.attack, attackers=attackers) if attackers else None,
        versions={"sylva_ray": __version__}
        | ({"commit": commit} if (commit := package_commit()) else {})
        | _installed("torch", "timm", "ray", "peft", "mlflow"),
        hardware=Hardware(
            machine=platform.machine(),
            cpus=os.cpu_count(),
            actors=costs.num_actors,
            threads_per_actor=config.cluster.threads_per_actor,
            device=config.training.device,
            gpus=_gpus(records) or None,
            host=platform.node() or None,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
        compute=compute_of(config),
    )


def compute_of(config: ResolvedConfig) -> Compute:
    """Return how a run with this resolved configuration computes."""
    kernels = config.training.attention
    return Compute(
        training_precision=config.training.precision,
        evaluation_precision=config.evaluation.precision,
        attention_float32=kernels.float32,
        attention_bfloat16=kernels.bfloat16,
    )


def _from_evaluation(evaluation: Mapping[str, ClientAccuracies], attackers: Sequence[int]) -> StageAccuracies:
    attacks = [condition for condition in evaluation if condition not in ("benign", UNBOUNDED.label)]
    plain = {c: Spread.from_values(accuracies.accuracy, attackers) for c, accuracies in evaluation.items()}
    balanced = {c: Spread.from_values(accuracies.balanced_accuracy, attackers) for c, accuracies in evaluation.items()}
    return StageAccuracies(
        benign_accuracy=plain["benign"],
        benign_balanced_accuracy=balanced["benign"],
        robust_accuracy={attack: plain[attack] for attack in attacks},
        robust_balanced_accuracy={attack: balanced[attack] for attack in attacks},
    )


def _end_of_phase(phase: int, records: Sequence[StageRecord], attackers: Sequence[int]) -> StageAccuracies | None:
    """Return the last accuracies that were measured in full in a phase; None where there are none."""
    in_full = [r for r in records if not r.in_part and r.panel is None]
    evaluations = [r.evaluation for r in in_full if phase_of(r.stage) == phase and r.evaluation]
    return _from_evaluation(evaluations[-1], attackers) if evaluations else None


def _communication(config: ResolvedConfig, records: Sequence[StageRecord], traffic: DeclaredTraffic) -> Communication:
    exchanges = [r for r in records if is_exchange(r.stage)]
    senders = sum(len(r.participants) - len(r.missing) - len(r.dropped) for r in exchanges)
    uploads, downloads = (
        sum(sizes) / senders if senders else 0
        for sizes in ([r.upload_payload_bytes for r in exchanges], [r.download_payload_bytes for r in exchanges])
    )
    return Communication(
        upload_bytes_per_client_round=traffic.upload,
        upload_payload_bytes_per_client_round=round(uploads),
        download_payload_bytes_per_client_round=round(downloads),
        download_bytes_per_client_round=traffic.download,
        total_bytes=sum(record.upload_bytes + record.download_bytes for record in records),
        full_model_bytes=traffic.full_model,
        full_model_ratio=traffic.full_model / traffic.upload if traffic.upload else None,
        compression=config.compression.kind,
        rounds=config.training.rounds,
    )


def run_seconds(records: Sequence[StageRecord], costs: RunCosts) -> RunSeconds:
    """Add up the seconds of all stages; workers are idle for the rest of the wall time.

    Args:
        records: of all stages.
        costs: of the run.
    """
    work: dict[str, float] = {}
    for record in records:
        for activity, seconds in record.worker_seconds.items():
            work[activity] = work.get(activity, 0.0) + seconds
    busy = sum(work.values())
    wall, aggregate = (sum(record.seconds.get(kind, 0.0) for record in records) for kind in ("wall", "aggregate"))
    return RunSeconds(
        total=costs.setup_seconds + wall,
        setup=costs.setup_seconds,
        aggregate=aggregate,
        idle=max(0.0, wall * costs.num_actors - busy - aggregate * costs.aggregates),
        **{activity: work.pop(activity, 0.0) for activity in ("train", "attack", "mixture", "game", "evaluate")},
        other=sum(work.values()),
    )


def _collapsed(
    config: ResolvedConfig,
    final: Mapping[str, ClientAccuracies],
    majority: Sequence[float],
    attackers: Sequence[int],
) -> list[bool] | None:
    """Return which clients collapsed under the attack of S14; None without one: nothing can be said.

    It is the first with a budget that uses gradients, or else the first with a budget.
    """
    bounded = [spec for spec in config.evaluation.specs if 0 < spec.epsilon < math.inf]
    by_gradient = [spec for spec in bounded if not find_attack(spec.name).black_box]
    if not bounded:
        return None
    robust = final[(by_gradient or bounded)[0].label].accuracy
    one_class = final["benign"].one_class or [0.0] * len(majority)
    return [
        client not in attackers and is_collapsed(accuracy, share, bool(single))
        for client, (accuracy, share, single) in enumerate(zip(robust, majority, one_class, strict=True))
    ]


def _checks(
    final: Mapping[str, ClientAccuracies],
    collapsed: list[bool] | None,
    fleet: FleetData,
    attackers: Sequence[int],
    honest: Sequence[int],
) -> list[CheckResult]:
    """Return S4, on `S4_IMAGES` images of each honest client, and S14 where something was attacked."""
    tested = [min(S4_IMAGES, len(fleet.clients[client].test)) for client in honest]
    unbounded = {client: final[UNBOUNDED.label].accuracy[client] for client in honest}
    s14 = [] if collapsed is None else [collapse(collapsed, attackers)]
    distinct = fleet.num_test_images(honest, S4_IMAGES)
    return [unbounded_attack(unbounded, fleet.num_classes, tested, distinct), *s14]


def _warnings(records: Sequence[StageRecord], checks: Sequence[CheckResult]) -> list[str]:
    warnings = [f"check {check.name} FAILED: {check.meaning}" for check in checks if not check.passed]
    for record in records:
        if record.missing:
            late = clients_text(record.missing)
            warnings.append(f"step {record.step}: {late} missed the deadline and kept the last state")
        if record.dropped:
            diverged = clients_text(record.dropped)
            warnings.append(f"step {record.step}: the training of {diverged} diverged, and the last state was kept")
    return warnings + _reductions(records) + _refusals(records) + _changes(records) + _several_gpus(records)


def _reductions(records: Sequence[StageRecord]) -> list[str]:
    """Return a line for every step that made windows smaller; those after it use the same."""
    lines: list[str] = []
    used: dict[str, int] = {}
    for record in records:
        if record.reduced_windows and record.reduced_windows != used:
            used = record.reduced_windows
            sizes = ", ".join(f"{name} {size}" for name, size in used.items())
            lines.append(
                f"step {record.step}: the memory was too small for the planned windows; used from then on were {sizes}"
            )
    return lines


def _gpus(records: Sequence[StageRecord]) -> list[str]:
    """Return the GPUs of all stages, each once."""
    return sorted({gpu for record in records for gpu in record.gpus or ()})


def _several_gpus(records: Sequence[StageRecord]) -> list[str]:
    """Say that bits depend on where tasks ran, if GPUs, drivers or CUDA differed."""
    gpus = _gpus(records)
    text = "tasks ran on different GPUs, drivers or versions of CUDA, so that a repetition has other last bits"
    return [f"{text}: {'; '.join(gpus)}"] if len(gpus) > 1 else []


def _changes(records: Sequence[StageRecord]) -> list[str]:
    """Say from which stage on data or weights were not those that the run began with."""
    first: dict[str, int] = {}
    for record in records:
        for what in record.changed_inputs or ():
            first.setdefault(what, record.step)
    return [f"since step {step}, {what} are not those that the run began with" for what, step in first.items()]


def _refusals(records: Sequence[StageRecord]) -> list[str]:
    """Return a sentence per client and reason: in how many rounds its upload was refused."""
    reasons = Counter(item for record in records for item in (record.refused or {}).items())
    return [
        f"the upload of client {client} was not merged in {count} round{'s' * (count > 1)}: {reason}"
        for (client, reason), count in reasons.items()
    ]


def _installed(*packages: str) -> dict[str, str]:
    """Return the versions of those of some packages that are installed; a run in this process needs no Ray."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions

"""``summary.json``: what a run found, in one page of numbers (schema in docs/summary.md)."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sylva_ray import __version__
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.types import AttackSpec
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.stages.kinds import is_exchange, phase_of
from sylva_ray.metrics.accuracy import spread
from sylva_ray.metrics.checks import UNBOUNDED, CheckResult, collapse, is_collapsed, unbounded_attack
from sylva_ray.transport.byzantine import byzantine_clients


@dataclass(frozen=True)
class DeclaredTraffic:
    """Bytes by declaration: what a client uploads and downloads in a round of phase 1 (the mean over clients), and the whole
    model in fp32, which full-model training would upload."""

    upload: int
    download: int
    full_model: int


STAGES = ("total", "setup", "train", "attack", "game", "evaluate", "aggregate", "idle")


def summarise(
    config: ResolvedConfig,
    fleet: FleetData,
    records: Sequence[Mapping[str, Any]],
    game: Mapping[str, Any] | None,
    traffic: DeclaredTraffic,
    num_actors: int,
    setup_seconds: float,
) -> dict[str, Any]:
    """Everything that ``summary.json`` holds but the tracker's warnings.

    Args:
        records: all of the run, the last one with a full evaluation.
        traffic: bytes by declaration.
    """
    attackers = byzantine_clients(config)
    majority = [fleet.client(c).majority_share for c in range(fleet.num_clients)]
    final = records[-1]["evaluation"]
    main = config.evaluation.specs[0].label if config.evaluation.attacks else "benign"
    collapsed = [
        is_collapsed(robust, share, bool(one_class))
        for robust, share, one_class in zip(
            final[main]["accuracy"], majority, final["benign"]["one_class"], strict=True
        )
    ]
    collapsed = [bad and client not in attackers for client, bad in enumerate(collapsed)]
    checks = _checks(final, collapsed, fleet.num_classes, attackers) if config.evaluation.checks else []
    return {
        "name": config.name,
        "algorithm": config.algorithm.name,
        "dataset": config.dataset.name,
        "backbone": config.backbone.name,
        "num_clients": fleet.num_clients,
        "num_classes": fleet.num_classes,
        "seed": config.seed,
        "rounds": config.training.rounds,
        "class_names": list(fleet.dataset.class_names),
        "label_matrix": fleet.label_matrix().tolist(),
        "clients": [
            _client(fleet, c, majority[c], collapsed[c]) | {"byzantine": c in attackers}
            for c in range(fleet.num_clients)
        ],
        "initial": _accuracies(records[0]["evaluation"], attackers),
        "phase1": _accuracies(_end_of_phase1(records), attackers),
        "final": _accuracies(final, attackers),
        "majority": spread(majority, attackers),
        "communication": _communication(config, records, traffic),
        "layer_game": dict(game) if game is not None else None,
        "seconds": _seconds(records, num_actors, setup_seconds),
        "peak_memory_bytes_per_actor": max(record["peak_memory_bytes"] for record in records),
        "checks": [vars(check) for check in checks],
        "warnings": _warnings(records, checks),
        "threat_model": threat_model(config, config.evaluation.specs),
        "byzantine": {"attack": config.byzantine.attack, "attackers": attackers} if attackers else None,
        "versions": {"sylva_ray": __version__}
        | {name: version(name) for name in ("torch", "timm", "ray", "peft", "mlflow")},
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "actors": num_actors,
            "threads_per_actor": config.cluster.threads_per_actor,
            "device": config.training.device,
        },
        "compute": compute(config),
    }


def compute(config: ResolvedConfig) -> dict[str, str]:
    """How a run computes, with nothing left to choose: precisions, and the attention kernel of each."""
    kernels = config.training.attention
    return {
        "training_precision": config.training.precision,
        "evaluation_precision": config.evaluation.precision,
        "attention_float32": kernels.float32,
        "attention_bfloat16": kernels.bfloat16,
    }


def _client(fleet: FleetData, client: int, majority_share: float, collapsed: bool) -> dict[str, Any]:
    data = fleet.clients[client]
    sizes = {name: len(getattr(data, name)) for name in ("train", "selection", "guard", "test")}
    return {"client": client, **sizes, "majority_share": majority_share, "collapsed": collapsed}


def _accuracies(evaluation: Mapping[str, Any] | None, attackers: Sequence[int]) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    attacks = [condition for condition in evaluation if condition not in ("benign", UNBOUNDED.label)]

    def fleet(condition: str, metric: str) -> dict[str, Any]:
        return spread(evaluation[condition][metric], attackers)

    return {
        "benign_accuracy": fleet("benign", "accuracy"),
        "benign_balanced_accuracy": fleet("benign", "balanced_accuracy"),
        "robust_accuracy": {name: fleet(name, "accuracy") for name in attacks},
        "robust_balanced_accuracy": {name: fleet(name, "balanced_accuracy") for name in attacks},
    }


def _end_of_phase1(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    phase1 = [r for r in records if phase_of(r["stage"]) == 1 and r["evaluation"] is not None]
    return phase1[-1]["evaluation"] if phase1 else None


def _communication(
    config: ResolvedConfig, records: Sequence[Mapping[str, Any]], traffic: DeclaredTraffic
) -> dict[str, Any]:
    exchanges = [r for r in records if is_exchange(r["stage"])]
    senders = sum(len(r["participants"]) - len(r["missing"]) - len(r["dropped"]) for r in exchanges)
    payload, answers = (
        sum(record[f"{way}_payload_bytes"] for record in exchanges) / senders if senders else 0
        for way in ("upload", "download")
    )
    return {
        "upload_bytes_per_client_round": traffic.upload,
        "upload_payload_bytes_per_client_round": round(payload),
        "download_payload_bytes_per_client_round": round(answers),
        "download_bytes_per_client_round": traffic.download,
        "total_bytes": sum(record["upload_bytes"] + record["download_bytes"] for record in records),
        "full_model_bytes": traffic.full_model,
        "full_model_ratio": traffic.full_model / traffic.upload if traffic.upload else None,
        "compression": config.compression.kind,
        "rounds": config.training.rounds,
    }


def _seconds(records: Sequence[Mapping[str, Any]], num_actors: int, setup: float) -> dict[str, float]:
    """``total`` is wall time; the stages are summed over workers; ``idle`` is what the workers waited."""
    wall = sum(record["seconds"]["wall"] for record in records)
    stages = {
        s: sum(r["seconds"].get(s, 0.0) for r in records) for s in ("train", "attack", "game", "evaluate", "aggregate")
    }
    busy = sum(stages.values()) - stages["aggregate"]
    return {"total": setup + wall, "setup": setup, **stages, "idle": max(0.0, wall * num_actors - busy)}


def _checks(
    final: Mapping[str, Any], collapsed: list[bool], num_classes: int, attackers: Sequence[int]
) -> list[CheckResult]:
    unbounded = spread(final[UNBOUNDED.label]["accuracy"], attackers)["mean"]
    return [unbounded_attack(unbounded, num_classes), collapse(collapsed)]


def _warnings(records: Sequence[Mapping[str, Any]], checks: Sequence[CheckResult]) -> list[str]:
    warnings = [f"check {check.name} FAILED: {check.meaning}" for check in checks if not check.passed]
    for record in records:
        if record["missing"]:
            who = ", ".join(map(str, record["missing"]))
            warnings.append(f"round {record['round']}: clients {who} missed the deadline and kept their state")
        if record["dropped"]:
            who = ", ".join(map(str, record["dropped"]))
            warnings.append(
                f"round {record['round']}: the training of clients {who} diverged; they kept their last state"
            )
    return warnings


_POOLS = {"test": "test", "train": "held-out training"}
"""``dataset.test_pool`` in words."""

NORMS = {"linf": "L-infinity", "l2": "L2", "l0": "L0 (pixels)"}
BLACK_BOX = ("noise", "square")
"""Attacks that see answers only."""


_EVALUATION_PRECISION = {
    "float32": "float32 at evaluation",
    "bfloat16": "benign answers in float32; attacks compute in bfloat16, and a success counts where float32 confirms it",
}


def threat_model(config: ResolvedConfig, attacks: Sequence[AttackSpec]) -> dict[str, str]:
    """What is attacked, how, and what the attacker knows."""
    used = {spec.norm for spec in attacks} or {"linf"}
    norms = ", ".join(words for norm, words in NORMS.items() if norm in used)
    labels = ", ".join(spec.label for spec in attacks)
    blind = sorted({spec.name for spec in attacks} & set(BLACK_BOX))
    box = f"white box ({' and '.join(blind)}: answers only)" if blind else "white box"
    return {
        "norm": f"{norms}, in [0, 1] pixel space at the data set's native size",
        "training": f"{_training_attack(config)} at epsilon {config.attack.epsilon * 255:.4g}/255",
        "evaluation": f"{labels}; {box}, on every client's own {_POOLS[config.dataset.test_pool]} images; "
        "every iterate counts, the clean one too",
        "knowledge": "the attacker knows the deployed personal weights; nothing is randomised at inference",
        "precision": _EVALUATION_PRECISION[config.evaluation.precision],
    }


def _training_attack(config: ResolvedConfig) -> str:
    return "FGSM-RS" if config.attack.name == "fgsm_rs" else f"PGD-{config.attack.steps}"

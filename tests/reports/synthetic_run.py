"""A synthetic run folder with random numbers, for tests and for looking at the report.

``python tests/reports/synthetic_run.py FOLDER [NUM_CLIENTS]`` writes one with its report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sylva_ray.attacks.pgd import PgdAttack
from sylva_ray.config.data import PartitionSection
from sylva_ray.config.experiment import AlgorithmSection, EvaluationSection, ExperimentConfig
from sylva_ray.config.tracking import TrackingSection
from sylva_ray.config.training import TrainingSection
from sylva_ray.core.records import StageRecord
from sylva_ray.storage.run_folder import RunFolder

UNBOUNDED = "pgd20-eps255"


def make_config(num_clients: int = 6, rounds: int = 8, **tracking: Any) -> ExperimentConfig:
    """Return a small experiment with two evaluation attacks."""
    attacks = (
        PgdAttack(epsilon=8 / 255),
        PgdAttack(epsilon=4 / 255, steps=50, loss="margin", restarts=2),
    )
    return ExperimentConfig(
        name="synthetic",
        algorithm=AlgorithmSection(name="sylva", phase2={"enabled": True}),
        partition=PartitionSection(num_clients=num_clients),
        training=TrainingSection(rounds=rounds),
        evaluation=EvaluationSection(every=2, attacks=attacks),
        tracking=TrackingSection(**{"detail": "clients", **tracking}),
    )


def make_run(
    run_dir: Path,
    config: ExperimentConfig | None = None,
    *,
    phase2: bool = True,
    finished: bool = True,
    class_names: list[str] | None = None,
) -> ExperimentConfig:
    """Write ``config.yaml``, ``rounds.jsonl``, ``adapters/`` and, if ``finished``, ``summary.json``."""
    config = config or make_config()
    class_names = class_names or [f"digit {digit}" for digit in range(10)]
    draw = np.random.default_rng(config.seed)
    records = make_records(config, draw, phase2)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(config.to_yaml())
    if not finished:
        records = records[: len(records) // 2]
    RunFolder(run_dir).write_records([StageRecord.from_json(record, "a synthetic run") for record in records])
    for client in range(config.partition.num_clients if finished else 0):
        folder = run_dir / "adapters" / f"client_{client:03d}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    if finished:
        summary = make_summary(config, records, draw, phase2, class_names)
        (run_dir / "summary.json").write_text(json.dumps(summary))
    return config


def make_records(config: ExperimentConfig, draw: np.random.Generator, phase2: bool) -> list[dict[str, Any]]:
    """Return records of warm-up, rounds, local epoch and, with ``phase2``, layer game and refinement."""
    clients, rounds = list(range(config.partition.num_clients)), config.training.rounds
    stages = ["warmup", *["phase1"] * rounds, "personalise", *["layer_game", "phase2"] * phase2]
    skill = np.clip(draw.normal(0.9, 0.05, len(clients)), 0.05, 0.99)
    records = []
    for step, stage in enumerate(stages):
        progress = min(1.0, step / (rounds + 1))
        evaluation = None
        if stage in ("warmup", "personalise", "phase2") or (stage == "phase1" and step % config.evaluation.every == 0):
            labels = [spec.label for spec in config.evaluation.specs]
            levels = {"benign": skill - 0.12 * progress + 0.05 * (stage == "phase2")}
            levels |= {label: skill * (0.02 + 0.6 * progress) / (1 + i) ** -0.3 for i, label in enumerate(labels)}
            if step == len(stages) - 1:
                levels |= {UNBOUNDED: 0 * skill}
            evaluation = {name: _accuracies(level, draw) for name, level in levels.items()}
            evaluation["benign"]["one_class"] = [0.0] * len(clients)
        train = stage in ("warmup", "phase1", "personalise")
        loss = 1.8 - progress + draw.normal(0, 0.05, len(clients))
        seconds = {"train": 2.1, "attack": 7.4} if train else {"game" if stage == "layer_game" else "train": 9.5}
        records.append(
            {
                "step": step,
                "stage": stage,
                "round": step,
                "epsilon": config.attack.epsilon * progress if train else None,
                "lr": 1e-3 if train else None,
                "participants": clients,
                "missing": [],
                "metrics": {"loss": {str(client): float(loss[client]) for client in clients}} if train else {},
                "evaluation": evaluation,
                "upload_bytes": 196_648 * len(clients) if stage == "phase1" else 0,
                "download_bytes": 196_648 * len(clients) if stage == "phase1" else 0,
                "seconds": seconds
                | {"evaluate": 3.0 if evaluation else 0.0, "aggregate": 0.1, "wall": 6.4 + step / 10},
                "peak_memory_bytes": 400_000_000,
            }
        )
    return records


def make_summary(
    config: ExperimentConfig,
    records: list[dict[str, Any]],
    draw: np.random.Generator,
    phase2: bool,
    class_names: list[str],
) -> dict[str, Any]:
    """Return ``summary.json`` of ``records``; the last client is collapsed and one check fails."""
    num_clients, num_classes = config.partition.num_clients, len(class_names)
    shares = draw.dirichlet(0.4 * np.ones(num_classes), num_clients)
    matrix = (shares * draw.integers(120, 400, (num_clients, 1))).astype(int)
    majority = shares.max(1).tolist()
    at = {record["stage"]: record["evaluation"] for record in records if record["evaluation"]}
    game = None
    if phase2:
        players = [f"blocks.{block}" for block in range(6)] + ["head"]
        shapley = draw.normal(0.0, 0.01, (num_clients, 7)) + np.linspace(-0.02, 0.02, 7)
        game = {
            "players": players,
            "shapley": shapley.tolist(),
            "shapley_benign": (shapley + 0.01).tolist(),
            "shapley_robust": np.full_like(shapley, 0.01).tolist(),
            "half_width": None,
            "selected": (shapley > 0.012).tolist(),
            "strength": [client % 3 / 2 for client in range(num_clients)],
            "coalitions_evaluated": 128 * num_clients,
            "exact": True,
        }
    return {
        "name": config.name,
        "algorithm": config.algorithm.name,
        "dataset": config.dataset.name,
        "num_clients": num_clients,
        "num_classes": num_classes,
        "seed": config.seed,
        "rounds": config.training.rounds,
        "class_names": class_names,
        "label_matrix": matrix.tolist(),
        "clients": [
            {
                "client": client,
                "train": int(matrix[client].sum()),
                "selection": 20,
                "guard": 20,
                "test": 100,
                "majority_share": majority[client],
                "collapsed": client == num_clients - 1,
            }
            for client in range(num_clients)
        ],
        "initial": _stage(at["warmup"]),
        "phase1": _stage(at["personalise"]),
        "final": _stage(records[-1]["evaluation"]),
        "majority": spread(majority),
        "communication": {
            "upload_bytes_per_client_round": 196_648,
            "download_bytes_per_client_round": 196_648,
            "total_bytes": sum(record["upload_bytes"] + record["download_bytes"] for record in records),
            "full_model_bytes": 10_721_320,
            "full_model_ratio": 10_721_320 / 196_648,
            "compression": "none",
        },
        "layer_game": game,
        "seconds": {
            "total": 96.2,
            "setup": 6.0,
            "train": 31.0,
            "attack": 88.8,
            "game": 9.5,
            "evaluate": 21.0,
            "aggregate": 0.8,
            "idle": 30.2,
        },
        "checks": [
            {"name": "S4", "passed": True, "value": 0.0, "meaning": "an attack without bound leaves 0.0% standing"},
            {"name": "S14", "passed": False, "value": 1 / num_clients, "meaning": "1 client shows no defence"},
        ],
        "warnings": ["check S14 FAILED: 1 client shows no defence", "step 3: client 2 missed the deadline"],
        "threat_model": {"norm": "L-infinity, in [0, 1] pixel space", "knowledge": "white box: all weights are known"},
        "versions": {"sylva_ray": "0.1.0", "commit": "3facf47b1d2e", "torch": "2.15.0"},
        "hardware": {
            "machine": "x86_64",
            "cpus": 2,
            "actors": 2,
            "threads_per_actor": 1,
            "device": "cpu",
            "host": "laptop",
            "finished": "2026-01-01T12:00:00+00:00",
        },
    }


def spread(values: Any) -> dict[str, Any]:
    """Return the statistics of a quantity per client."""
    v = np.asarray(values, float)
    names = {"mean": v.mean(), "std": v.std(), "min": v.min(), "p10": np.percentile(v, 10)}
    names |= {"median": np.median(v), "max": v.max()}
    return {name: float(value) for name, value in names.items()} | {"per_client": v.tolist()}


def _accuracies(level: np.ndarray, draw: np.random.Generator) -> dict[str, list[float]]:
    plain = np.clip(level + draw.normal(0, 0.02, len(level)), 0, 1)
    return {"accuracy": plain.tolist(), "balanced_accuracy": (0.9 * plain).tolist()}


def _stage(evaluation: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    attacks = [name for name in evaluation if name not in ("benign", UNBOUNDED)]
    return {
        "benign_accuracy": spread(evaluation["benign"]["accuracy"]),
        "benign_balanced_accuracy": spread(evaluation["benign"]["balanced_accuracy"]),
        "robust_accuracy": {name: spread(evaluation[name]["accuracy"]) for name in attacks},
        "robust_balanced_accuracy": {name: spread(evaluation[name]["balanced_accuracy"]) for name in attacks},
    }


if __name__ == "__main__":
    from sylva_ray.reports.pages.run import write_report
    from sylva_ray.storage.run_folder import RunFolder

    folder = Path(sys.argv[1])
    make_run(folder, make_config(int(sys.argv[2]) if len(sys.argv) > 2 else 6))
    print(write_report(RunFolder(folder)))

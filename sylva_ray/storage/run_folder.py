"""The folder of a run: the names of its files, who may write to it, and what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sylva_ray.config.experiment import CONFIG, ExperimentConfig, load_run_config, with_choices_of
from sylva_ray.core.errors import UserError
from sylva_ray.storage.atomic import write_json
from sylva_ray.storage.checkpoint import CheckpointFolder

RECORDS, SUMMARY = "rounds.jsonl", "summary.json"


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


def _difference(present: ExperimentConfig, wanted: ExperimentConfig) -> str:
    """The first key that changes the result and differs, or ''. An ``auto`` that was never resolved accepts any choice."""
    a, b = with_choices_of(present, wanted).flat(), wanted.flat()
    free = tuple(
        key for key in a | b if key.startswith(("cluster.", "tracking.")) and key != "cluster.threads_per_actor"
    )
    for key in sorted((a | b).keys() - set(free)):
        if a.get(key) != b.get(key):
            return f"{key}: {a.get(key, 'not set')} there, {b.get(key, 'not set')} now"
    return ""


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Atomically, so that a reader never sees half of it."""
    write_json(run_dir / SUMMARY, summary)


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

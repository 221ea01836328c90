"""Whole experiments in this process, and what they leave in their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Summary
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.observer import Observer
from sylva_ray.preparation.experiment import Prepared, create_worker
from sylva_ray.storage.checkpoint import Checkpoint, CheckpointFolder
from sylva_ray.storage.run_folder import RunFolder


def run(made: Prepared, folder: Path, observer: Observer | None = None) -> Summary:
    """Run it, or go on where the folder (or the checkpoint that was put there) ends."""
    folder.mkdir(exist_ok=True)
    if not any(folder.iterdir()):
        RunFolder(folder).claim(made.config, resume=False)
    pool = InProcessPool(create_worker(made.config, made.fleet, made.backbone))
    return run_experiment(made, RunFolder(folder), pool, observer or Observer())


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def newest(folder: Path) -> Checkpoint:
    """The newest checkpoint."""
    checkpoint = CheckpointFolder(folder / "checkpoint").latest()
    assert checkpoint is not None
    return checkpoint


def bare_record(step: int) -> StageRecord:
    """A record that says little more than its number."""
    return StageRecord(step=step, stage="phase1", round=step, participants=[])

"""Finished measurements on disk, one file per task, so that an evaluation that was cut goes on where it was.

A part's name is a hash of everything that its values depend on: the task, the clients' states, the data's settings, the
seed. So the parts of an older state of the run, or of other settings, are simply not found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.federation.client.measuring import EvaluateOutcome
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.storage.atomic import write_atomically

SETTINGS = ("dataset", "partition", "backbone", "lora", "seed")
"""Of the config: what images there are, and what model answers."""


class MeasurementCache:
    """``FOLDER/<hash>.safetensors``."""

    def __init__(self, folder: Path, config: ExperimentConfig) -> None:
        self.folder = folder
        resolved = json.loads(config.model_dump_json())
        settings = {key: resolved[key] for key in SETTINGS}
        if config.evaluation.precision != "float32":  # parts of version 0.1, which knew no other, are still found
            settings["precision"] = config.evaluation.precision
        self._settings = json.dumps(settings, sort_keys=True)

    def load(self, task: CohortTask) -> list[EvaluateOutcome] | None:
        """What was measured before, one outcome per client of the task; None if it was not, or cannot be read."""
        path = self._path(task)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                passes = json.loads(file.metadata()["passes"])
                values = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, KeyError, ValueError):
            return None
        return [
            EvaluateOutcome(
                {n.partition(":")[2]: v for n, v in values.items() if n.startswith(f"{client}:")},
                {name: (int(forward), int(backward)) for name, (forward, backward) in passes.items()},
            )
            for client in task.clients
        ]

    def keep(self, task: CohortTask, outcomes: list[EvaluateOutcome]) -> None:
        """Write a task's outcomes, at once or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {
            f"{client}:{name}": np.ascontiguousarray(value)
            for client, outcome in zip(task.clients, outcomes, strict=True)
            for name, value in outcome.values.items()
        }
        write_atomically(self._path(task), save(values, {"passes": json.dumps(outcomes[0].passes)}))

    def _path(self, task: CohortTask) -> Path:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{type(task).__name__}{self._settings}".encode())
        for field in dataclasses.fields(task):
            digest.update(field.name.encode())
            _feed(digest, getattr(task, field.name))
        return self.folder / f"{digest.hexdigest()}.safetensors"


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        for name in sorted(value):
            digest.update(name.encode())
            _feed(digest, value[name])
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())

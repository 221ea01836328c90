"""A cache of finished measurements on disk, one file per task, so that an interrupted evaluation can continue.

The name of a file is a hash of everything that the values depend on: the task, the states of the clients, the settings
of the data, the seed, the modules of attacks of one's own. Measurements of older states, or with other settings or
another code of such an attack, have other names. What these modules import is not hashed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sylva_ray.attacks.registry import ATTACKS, find_attack
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.types import AttackSpec
from sylva_ray.federation.client.measuring import EvaluateOutcome
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.storage.atomic import write_atomically

SETTINGS = ("dataset", "partition", "backbone", "lora", "seed")
"""Keys of the configuration that decide which images and which model are measured."""

NEW_SETTINGS = {
    ("dataset", "label"): None,
    ("dataset", "image"): None,
    ("partition", "test_shares"): "own",
    ("partition", "leftovers"): "first",
    ("lora", "train_norms"): False,
}
"""Settings that version 0.1 did not have, with its values; they are hashed where they have another one."""

REVISED_NORMS, REVISED_ATTACKS = {"l2": "3"}, {"mim": "2", "fab": "2", "sparsefool": "2"}
"""Norms and attacks that find more than in version 0.1, with the number of the revision, which is hashed."""

REVISED_TASKS = {"ProbeTask": "2"}
"""Measurements that know gradients that are not finite, which those of version 0.1 did not."""

REVISED_IN_BFLOAT16 = {"apgd": "2", "autoattack": "2"}
"""The same for attacks in another precision than float32."""

REVISED_RESTARTS = "2"
"""The same for restarts without random starts."""

HASHED_NAMES = {"num_draws": "draws", "step": "round"}
"""Fields of tasks that are hashed under the name of version 0.1, whose measurements are still found."""


class MeasurementCache:
    """Files ``FOLDER/<hash>.safetensors``.

    Args:
        folder: of the files; it need not exist.
        config: of the run.
        changed: the digests of data and weights, if they are not those of the run; its measurements are then not used.
    """

    def __init__(self, folder: Path, config: ResolvedConfig, changed: Inputs | None = None) -> None:
        self.folder = folder
        resolved = json.loads(config.model_dump_json())
        settings = {key: resolved[key] for key in SETTINGS}
        for (section, name), default in NEW_SETTINGS.items():
            if resolved[section][name] == default:
                del settings[section][name]
        self._precision = config.evaluation.precision
        if self._precision != "float32":  # version 0.1 had no other precision, and no such setting
            settings["precision"] = self._precision
        if changed is not None:
            settings["changed inputs"] = changed.to_json()
        self._settings = json.dumps(settings, sort_keys=True)

    def load(self, task: CohortTask) -> list[EvaluateOutcome] | None:
        """Load the outcomes of a task, one per client; None where there are none, or the file cannot be read."""
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
                {name: (int(forwards), int(backwards)) for name, (forwards, backwards) in passes.items()},
            )
            for client in task.clients
        ]

    def save(self, task: CohortTask, outcomes: Sequence[EvaluateOutcome]) -> None:
        """Save the outcomes of a task, one per client, in one atomic write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {
            f"{client}:{name}": np.ascontiguousarray(value)
            for client, outcome in zip(task.clients, outcomes, strict=True)
            for name, value in outcome.values.items()
        }
        write_atomically(self._path(task), save(values, {"passes": json.dumps(outcomes[0].passes)}))

    def _path(self, task: CohortTask) -> Path:
        digest = hashlib.blake2b(digest_size=16)
        kind = type(task).__name__
        digest.update(f"{kind}{REVISED_TASKS.get(kind, '')}{self._settings}".encode())
        for field in dataclasses.fields(task):
            digest.update(HASHED_NAMES.get(field.name, field.name).encode())
            _update(digest, getattr(task, field.name))
        for spec in _attacks_of(task):
            digest.update((self._revision(spec) + _own_code(spec)).encode())
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def _revision(self, spec: AttackSpec) -> str:
        """Return the revisions of an attack, an empty text for one that finds what it found in version 0.1."""
        in_bfloat16 = REVISED_IN_BFLOAT16.get(spec.name, "") if self._precision != "float32" else ""
        restarts = REVISED_RESTARTS if spec.restarts > 1 and not spec.random_start and spec.name == "pgd" else ""
        return REVISED_NORMS.get(spec.norm, "") + REVISED_ATTACKS.get(spec.name, "") + in_bfloat16 + restarts


def _attacks_of(task: CohortTask) -> Iterator[AttackSpec]:
    """Yield the attacks of a task."""
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        yield from (spec for spec in (value if isinstance(value, tuple) else (value,)) if isinstance(spec, AttackSpec))


def _own_code(spec: AttackSpec) -> str:
    """Return the code of the module of an attack that is not of this package; nothing for one of this package."""
    if spec.name in ATTACKS:
        return ""
    module = inspect.getmodule(find_attack(spec.name))
    try:
        return inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):  # written in a notebook
        return ""


def _update(digest: hashlib.blake2b, value: object) -> None:
    """Add a value of a task to a hash; of arrays with type and shape, of mappings in the order of their keys."""
    if isinstance(value, dict):
        for name in sorted(value):
            digest.update(name.encode())
            _update(digest, value[name])
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())

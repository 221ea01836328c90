"""Immutable checkpoints: ``checkpoint/round_0007/`` with a manifest that is written last.

A folder without a manifest, or whose files do not match the manifest's checksums, is ignored, so that after an
interrupted write the checkpoint before it is the newest. Equal runs write equal bytes: files contain no time and no
path.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from sylva_ray.core.errors import UserError
from sylva_ray.core.records import GameRecord, StageRecord
from sylva_ray.core.types import ClientState, stack_states, unstack_states
from sylva_ray.storage.atomic import write_atomically

STATES, RESIDUALS = "states.safetensors", "residuals.safetensors"
PROGRESS, MANIFEST = "progress.json", "manifest.json"

NUM_KEPT = 3
"""Checkpoints kept: the newest, and two in case that it is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after one of its stages.

    Attributes:
        step: position of the stage in the run, from 0.
        states: of the K clients, ``{parameter name: array}``.
        records: of all stages so far.
        game: what the layer game decided; None: not played yet, or not at all.
        residuals: what error feedback keeps of each client until its next upload, ``{client: {name: array}}``.
    """

    step: int
    states: list[dict[str, np.ndarray]]
    records: list[StageRecord]
    game: GameRecord | None
    residuals: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        root: the folder ``checkpoint/``; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def save(
        self,
        step: int,
        states: Sequence[ClientState],
        records: Sequence[StageRecord],
        game: GameRecord | None,
        residuals: Mapping[int, ClientState] | None = None,
    ) -> None:
        """Write ``round_<step>/`` and delete all but the newest `NUM_KEPT`. A complete checkpoint is never changed.

        Args:
            step: see `Checkpoint`, as the other arguments.
            states: of the K clients.
            records: of all stages so far.
            game: what the layer game decided.
            residuals: of error feedback; None: none.
        """
        folder = self.root / f"round_{step:04d}"
        if _is_complete(folder):
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        progress = {
            "step": step,
            "records": [record.to_json() for record in records],
            "game": None if game is None else game.to_json(),
        }
        files = {STATES: save(stack_states(states)), PROGRESS: json.dumps(progress, sort_keys=True).encode()}
        if residuals:
            files[RESIDUALS] = save(_to_arrays(residuals))
        for name, content in files.items():
            write_atomically(folder / name, content, durable=True)
        checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = json.dumps({"step": step, "sha256": checksums}, sort_keys=True)
        write_atomically(folder / MANIFEST, manifest, durable=True)
        for old in sorted(self.root.glob("round_*"))[:-NUM_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None where there is none yet.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        folders = sorted(self.root.glob("round_*"), reverse=True)
        for folder in folders:
            if _is_complete(folder):
                return _load(folder)
        if any((folder / MANIFEST).exists() for folder in folders):
            fix = "every checkpoint there is damaged; start again with another --out"
            raise UserError("checkpoint", str(self.root), fix)
        return None


def _load(folder: Path) -> Checkpoint:
    progress = json.loads((folder / PROGRESS).read_text())
    states = unstack_states(dict(sorted(load_file(folder / STATES).items())))
    arrays = load_file(folder / RESIDUALS) if (folder / RESIDUALS).exists() else {}
    source = str(folder / PROGRESS)
    records = [StageRecord.from_json(record, source) for record in progress["records"]]
    game = None if progress["game"] is None else GameRecord.from_json(progress["game"], source)
    return Checkpoint(progress["step"], states, records, game, _to_residuals(arrays))


def _to_arrays(residuals: Mapping[int, ClientState]) -> dict[str, np.ndarray]:
    """Flatten ``{client: {name: array}}`` to ``{"client:name": array}``."""
    return {f"{client}:{name}": value for client, state in residuals.items() for name, value in state.items()}


def _to_residuals(arrays: Mapping[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """Invert `_to_arrays`."""
    residuals: dict[int, dict[str, np.ndarray]] = {}
    for key, value in sorted(arrays.items()):
        client, _, name = key.partition(":")
        residuals.setdefault(int(client), {})[name] = value
    return residuals


def _is_complete(folder: Path) -> bool:
    try:
        checksums = json.loads((folder / MANIFEST).read_text())["sha256"]
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum for name, checksum in checksums.items()
        )
    except (OSError, ValueError, KeyError):
        return False

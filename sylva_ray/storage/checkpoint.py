"""Immutable checkpoints: ``checkpoint/round_0007/`` with its manifest written last.

A folder without a manifest, or whose files do not match the manifest's checksums, does not count, so a torn write leaves
the previous round in force. Equal runs write equal bytes: no time and no path is inside.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from sylva_ray.core.errors import UserError
from sylva_ray.core.records import GameRecord, StageRecord
from sylva_ray.core.types import ClientState, stack_states, unstack_states

STATES, PROGRESS, MANIFEST = "states.safetensors", "progress.json", "manifest.json"
RESIDUALS = "residuals.safetensors"
KEEP = 3
"""Checkpoints kept: the newest, and two to fall back on."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything after ``step``: the K client states, the records so far, what the layer game decided (or None), and what
    compression with error feedback still owes, ``{client: state}``."""

    step: int
    states: list[dict[str, np.ndarray]]
    records: list[StageRecord]
    game: GameRecord | None
    residuals: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)


class CheckpointFolder:
    """The ``checkpoint/`` of a run."""

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
        """Write ``round_<step>/`` and drop all but the newest `KEEP`. A step that is complete already is left as it is."""
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
            owed = {f"{client}:{n}": value for client, state in residuals.items() for n, value in state.items()}
            files[RESIDUALS] = save(owed)
        for name, content in files.items():
            _write(folder / name, content)
        manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        _write(folder / MANIFEST, json.dumps({"step": step, "sha256": manifest}, sort_keys=True).encode())
        for old in sorted(self.root.glob("round_*"))[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None where there is none yet.

        Raises:
            UserError: there are checkpoints, and not one of them is whole.
        """
        folders = sorted(self.root.glob("round_*"), reverse=True)
        for folder in folders:
            if _is_complete(folder):
                progress = json.loads((folder / PROGRESS).read_text())
                states = unstack_states(dict(sorted(load_file(folder / STATES).items())))
                owed = load_file(folder / RESIDUALS) if (folder / RESIDUALS).exists() else {}
                residuals: dict[int, dict[str, np.ndarray]] = {}
                for key, value in sorted(owed.items()):
                    client, _, name = key.partition(":")
                    residuals.setdefault(int(client), {})[name] = value
                source = str(folder / PROGRESS)
                records = [StageRecord.from_json(record, source) for record in progress["records"]]
                game = None if progress["game"] is None else GameRecord.from_json(progress["game"], source)
                return Checkpoint(progress["step"], states, records, game, residuals)
        if any((folder / MANIFEST).exists() for folder in folders):
            raise UserError(
                "checkpoint", str(self.root), "every checkpoint there is damaged; start anew with another --out"
            )
        return None


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())["sha256"]
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in manifest.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _write(path: Path, content: bytes) -> None:
    """Through to the disk before the next file begins: the manifest must not arrive before what it vouches for."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

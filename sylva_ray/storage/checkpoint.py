"""Immutable checkpoints: ``checkpoint/round_0007/`` with a manifest that is written last.

::

    states.safetensors   states of the clients        config.json    settings that the results depend on
    progress.json        records, layer game          inputs.json    digests of data and weights
    manifest.json        checksums of all             residuals.safetensors   of error feedback, where there is any

States that have not changed since an earlier checkpoint are not written again (`sylva_ray.storage.state_rows`).
After an interrupted write, the checkpoint before it is the newest. Equal runs write equal bytes: files contain no time
and no path but those of the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.files import read_regular_file
from sylva_ray.core.records import GameRecord, StageRecord
from sylva_ray.core.types import ClientState
from sylva_ray.storage.arrays import Content, arrays_in
from sylva_ray.storage.manifest import (
    MANIFEST,
    DamagedError,
    folder_name,
    read_checked,
    remove_step,
    steps_in,
    write_step,
)
from sylva_ray.storage.reading import parse_json
from sylva_ray.storage.state_rows import PLACES, ROW_FILES, STATES, StoredStates, read_states, write_states

RESIDUALS = "residuals.safetensors"
PROGRESS, CONFIG_COPY, INPUTS_COPY = "progress.json", "config.json", "inputs.json"


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay when a new one has been written.

    Attributes:
        newest: that many; all but one in case that the newest is damaged.
        steps: and those of these steps.
    """

    newest: int = 3
    steps: Collection[int] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A run after one of its stages.

    Attributes:
        step: position of the stage in the run, from 0.
        stored: the states of the K clients, and where they are.
        records: of all stages so far.
        game: what the layer game decided; None: not played yet, or not at all.
        residuals: what error feedback keeps of each client until its next upload, ``{client: {name: array}}``.
        config: the settings that the run's results depend on; None: an older version did not store them.
        inputs: the digests of data and weights; None: an older version did not store them.
        damaged: newer checkpoints that are not what was written, each as ``NAME: reason``.
    """

    step: int
    stored: StoredStates
    records: list[StageRecord]
    game: GameRecord | None
    residuals: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None
    damaged: tuple[str, ...] = ()

    @property
    def states(self) -> list[dict[str, np.ndarray]]:
        """The states of the K clients, ``{parameter name: array}``."""
        return [dict(state) for state in self.stored.states]


@dataclass(frozen=True)
class Origin:
    """What a run is made from; a copy is part of every checkpoint.

    Attributes:
        config: the settings that results depend on, as plain values.
        inputs: the digests of data and weights, as plain values; None: not known.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Draft:
    """The states of a checkpoint that is not complete.

    Attributes:
        step: see `Checkpoint`.
        stored: what the checkpoint will hold.
        checksums: ``{file name: SHA-256}`` of the files that are written.
    """

    step: int
    stored: StoredStates
    checksums: Mapping[str, str]


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        root: the folder ``checkpoint/``; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def begin(self, step: int, states: Sequence[ClientState], before: StoredStates | None = None) -> Draft | None:
        """Write the states of ``round_<step>/``, which does not count before `complete`.

        Args:
            step: see `Checkpoint`.
            states: of the K clients.
            before: what the checkpoint before this one holds; None: all states are written.

        Returns:
            What is written; None where this checkpoint is complete already, and never changed.
        """
        folder = self.root / folder_name(step)
        if _is_complete(folder):
            return None
        self.remove(step)
        folder.mkdir(parents=True)
        return Draft(step, *write_states(folder, step, states, before))

    def complete(
        self,
        draft: Draft,
        records: Sequence[StageRecord],
        game: GameRecord | None,
        residuals: Mapping[int, ClientState] | None = None,
        origin: Origin | None = None,
        kept: Kept = Kept(),
    ) -> None:
        """Write the rest of ``round_<step>/``, its manifest last, and delete all but the newest checkpoints.

        Args:
            draft: the result of `begin`.
            records: of all stages so far.
            game: what the layer game decided.
            residuals: of error feedback; None: none.
            origin: what the run is made from; None: not known.
            kept: which checkpoints stay.
        """
        progress = {
            "step": draft.step,
            "records": [record.to_json() for record in records],
            "game": None if game is None else game.to_json(),
        }
        files = {PROGRESS: _encode(progress)}
        if residuals:
            files[RESIDUALS] = save(_to_arrays(residuals))
        if origin is not None:
            files[CONFIG_COPY] = _encode(origin.config)
            if origin.inputs is not None:
                files[INPUTS_COPY] = _encode(origin.inputs)
        write_step(self.root / folder_name(draft.step), draft.step, files, draft.checksums)
        older = [old for old in self.steps() if old <= draft.step]
        for old in older[: -kept.newest]:
            if old not in kept.steps:
                self.remove(old)

    def save(
        self,
        step: int,
        states: Sequence[ClientState],
        records: Sequence[StageRecord],
        game: GameRecord | None,
        residuals: Mapping[int, ClientState] | None = None,
        before: StoredStates | None = None,
        kept: Kept = Kept(),
    ) -> StoredStates | None:
        """Write a checkpoint at once: `begin`, then `complete`.

        Returns:
            What it holds; None where it was complete already.
        """
        draft = self.begin(step, states, before)
        if draft is None:
            return None
        self.complete(draft, records, game, residuals, kept=kept)
        return draft.stored

    def steps(self) -> list[int]:
        """Return the steps that have a folder, complete or not, the oldest first."""
        return steps_in(self.root)

    def remove(self, step: int) -> None:
        """Delete the folder of a step, its manifest first: without it, the rest does not count."""
        remove_step(self.root / folder_name(step))

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is as it was written, or None where there is none yet.

        Raises:
            UserError: all checkpoints are damaged, or one says something that this package does not write: a manifest
                or records of another form, states with other shapes than each other, or with values that are not
                finite.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            folder = self.root / folder_name(step)
            try:
                files = _read(folder)
            except FileNotFoundError:
                continue
            except DamagedError as error:
                damaged.append(str(error))
                continue
            return _parse(folder, step, files, tuple(damaged))
        if damaged:
            fix = f"every checkpoint there is damaged ({damaged[0]}); start again with another --out"
            raise UserError("checkpoint", str(self.root), fix)
        return None

    def settings(self) -> dict[str, Any] | None:
        """Return the settings that the newest complete checkpoint holds; its states are not read.

        Returns:
            None where there is no checkpoint yet, or it is of a version that held no copy.

        Raises:
            UserError: the copy cannot be read, or is not a JSON object.
        """
        for step in reversed(self.steps()):
            folder = self.root / folder_name(step)
            if (folder / MANIFEST).exists():
                try:
                    return _parse_object(folder / CONFIG_COPY, read_regular_file(folder / CONFIG_COPY, "checkpoint"))
                except FileNotFoundError:
                    return None
        return None


def _encode(content: object) -> bytes:
    try:
        return json.dumps(content, allow_nan=False).encode()
    except ValueError as error:
        raise RunError(f"a record cannot be written, because JSON has no such number ({error})") from error


def _read(folder: Path) -> dict[str, Content]:
    return read_checked(folder, (STATES, PROGRESS), (PLACES, RESIDUALS, CONFIG_COPY, INPUTS_COPY), ROW_FILES)


def _parse(folder: Path, step: int, files: Mapping[str, Content], damaged: tuple[str, ...]) -> Checkpoint:
    progress = _parse_object(folder / PROGRESS, files[PROGRESS])
    source = str(folder / PROGRESS)
    if progress.get("step") != step or type(progress["step"]) is not int:
        raise UserError("checkpoint", source, f"its step must be {step}, the number of its folder")
    if not isinstance(progress.get("records"), list):
        raise UserError("checkpoint", source, "its records must be a list")
    game = progress.get("game")
    residuals = arrays_in(folder / RESIDUALS, files[RESIDUALS]) if RESIDUALS in files else {}
    return Checkpoint(
        step=step,
        stored=read_states(folder, step, files, _checksums(folder)),
        records=[StageRecord.from_json(record, source) for record in progress["records"]],
        game=None if game is None else GameRecord.from_json(game, source),
        residuals=_to_residuals(folder / RESIDUALS, residuals),
        config=_parse_object(folder / CONFIG_COPY, files[CONFIG_COPY]) if CONFIG_COPY in files else None,
        inputs=_parse_object(folder / INPUTS_COPY, files[INPUTS_COPY]) if INPUTS_COPY in files else None,
        damaged=damaged,
    )


def _checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of a manifest that has been checked."""
    found: dict[str, str] = json.loads((folder / MANIFEST).read_text())["sha256"]
    return found


def _parse_object(path: Path, content: Content) -> dict[str, Any]:
    try:
        value = parse_json(bytes(content))
    except ValueError as error:
        raise UserError("checkpoint", str(path), f"is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError("checkpoint", str(path), "must be a JSON object")
    return value


def _is_finite(value: np.ndarray) -> bool:
    return value.dtype.kind in "biuf" and bool(np.isfinite(value).all())


def _to_arrays(residuals: Mapping[int, ClientState]) -> dict[str, np.ndarray]:
    """Flatten ``{client: {name: array}}`` to ``{"client:name": array}``, in the order of memory that files have."""
    return {
        f"{client}:{name}": np.asarray(value, order="C")
        for client, state in residuals.items()
        for name, value in state.items()
    }


def _to_residuals(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """Invert `_to_arrays`."""
    residuals: dict[int, dict[str, np.ndarray]] = {}
    for key, value in sorted(arrays.items()):
        client, colon, name = key.partition(":")
        if not colon or not client.isascii() or not client.isdigit() or len(client) > 9:
            raise UserError("checkpoint", str(path), f"the array {key[:80]!r} must be named CLIENT:PARAMETER")
        if not _is_finite(value):
            raise UserError("checkpoint", str(path), f"the array {name[:80]!r} of client {client} is not finite")
        residuals.setdefault(int(client), {})[name] = value
    return residuals


def _is_complete(folder: Path) -> bool:
    try:
        _read(folder)
    except (FileNotFoundError, DamagedError):
        return False
    return True

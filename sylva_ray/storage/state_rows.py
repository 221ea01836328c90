"""States of clients as rows of files, of which a checkpoint writes those that no earlier file holds.

::

    states.safetensors      rows that are new in this step, {name: [rows, ...]}
    rows_0007.safetensors   a link to the rows that step 7 wrote, where clients still have some of them
    places.safetensors      {names, joined by commas: [K, 2] int32}: the step and the row of every client's arrays

A checkpoint in which every client has new arrays is ``states.safetensors`` alone, with one row per client. Arrays are
the same if they are the same object: states are replaced, never changed in place. Several clients with one array share
its row. A file of which clients have less than half is not linked on: what they have of it is written again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ClientState
from sylva_ray.storage.arrays import MIN_MAPPED_BYTES, Content, arrays_in, read_content, write_rows
from sylva_ray.storage.atomic import link_or_copy, write_atomically

STATES, PLACES = "states.safetensors", "places.safetensors"

ROW_FILES = re.compile(r"states\.safetensors|rows_(\d{4,12})\.safetensors")
"""Names of files of rows; the number is the step that wrote those of a link."""


@dataclass(frozen=True)
class StoredStates:
    """The states of K clients as a checkpoint holds them.

    Attributes:
        states: ``{parameter name: array}`` of each; clients with the same row have the same object.
        places: ``{parameter name: [K, 2] int64}``, the step whose file holds the array, and the row there.
        files: ``{step: file in the folder of the checkpoint}``.
        checksums: ``{step: SHA-256 of its file}``.
        num_rows: ``{step: rows in its file, of all parameters}``.
    """

    states: list[dict[str, np.ndarray]]
    places: dict[str, np.ndarray]
    files: dict[int, Path]
    checksums: dict[int, str]
    num_rows: dict[int, int]


@dataclass
class _Plan:
    """What a checkpoint writes.

    Attributes:
        step: of the checkpoint.
        places: see `StoredStates`.
        rows: new rows, ``{parameter name: arrays}``.
    """

    step: int
    places: dict[str, np.ndarray]
    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, array: np.ndarray) -> tuple[int, int]:
        """Add a new row and return its place."""
        rows = self.rows.setdefault(name, [])
        rows.append(array)
        return self.step, len(rows) - 1


def linked_name(step: int) -> str:
    """Return the name of a link to the rows that an earlier step wrote."""
    return f"rows_{step:04d}.safetensors"


def write_states(
    folder: Path, step: int, states: Sequence[ClientState], before: StoredStates | None
) -> tuple[StoredStates, dict[str, str]]:
    """Write the states of K clients into the folder of a checkpoint.

    Args:
        folder: of the checkpoint, which holds none of these files.
        step: of the checkpoint.
        states: of the clients; their arrays are made read-only.
        before: what the checkpoint before holds; None: everything is written.

    Returns:
        What the checkpoint holds, and ``{file name: SHA-256}`` of the files.
    """
    plan = _planned(step, states, before)
    checksums = {STATES: write_rows(folder / STATES, plan.rows)}
    used = {int(s) for column in plan.places.values() for s in np.unique(column[:, 0])} - {step}
    for other in sorted(used):
        assert before is not None, "rows of earlier steps"
        link_or_copy(before.files[other], folder / linked_name(other))
        checksums[linked_name(other)] = before.checksums[other]
    if not _is_plain(plan):
        content = save(_joined(plan.places))
        checksums[PLACES] = _write_places(folder / PLACES, content)
    files = {other: folder / linked_name(other) for other in used} | {step: folder / STATES}
    sums = {other: checksums[linked_name(other)] for other in used} | {step: checksums[STATES]}
    num_rows = {other: before.num_rows[other] for other in used} if before else {}
    num_rows[step] = sum(map(len, plan.rows.values()))
    return StoredStates(_stored(folder, plan, states, before), plan.places, files, sums, num_rows), checksums


def _planned(step: int, states: Sequence[ClientState], before: StoredStates | None) -> _Plan:
    names = sorted(states[0])
    if before is not None and (len(before.states) != len(states) or sorted(before.places) != names):
        before = None
    plan = _Plan(step, {name: np.full((len(states), 2), -1) for name in names})
    for name in names:
        column = plan.places[name]
        if before is not None:
            column[:] = before.places[name]
        new: dict[int, tuple[int, int]] = {}
        for client, state in enumerate(states):
            array = state[name]
            if before is not None and array is before.states[client][name]:
                continue
            if id(array) not in new:
                new[id(array)] = plan.add(name, array)
            column[client] = new[id(array)]
    if before is not None:
        _move_few(plan, states, before)
    return plan


def _move_few(plan: _Plan, states: Sequence[ClientState], before: StoredStates) -> None:
    """Write again what is left of files of which clients have less than half."""
    live = dict.fromkeys(before.files, 0)
    for column in plan.places.values():
        used = np.unique(column[:, 0] * len(column) + column[:, 1]) // len(column)
        for other, count in zip(*np.unique(used, return_counts=True), strict=True):
            if int(other) in live:
                live[int(other)] += int(count)
    few = [other for other, count in live.items() if 0 < 2 * count < before.num_rows[other]]
    for name, column in plan.places.items():
        moved: dict[tuple[int, int], tuple[int, int]] = {}
        for client in np.flatnonzero(np.isin(column[:, 0], few)).tolist():
            place = (int(column[client, 0]), int(column[client, 1]))
            if place not in moved:
                moved[place] = plan.add(name, states[client][name])
            column[client] = moved[place]


def _is_plain(plan: _Plan) -> bool:
    """Return whether every client has its own new row, in the order of the clients."""
    return all(
        bool((column[:, 0] == plan.step).all() and (column[:, 1] == np.arange(len(column))).all())
        for column in plan.places.values()
    )


def _stored(
    folder: Path, plan: _Plan, states: Sequence[ClientState], before: StoredStates | None
) -> list[dict[str, np.ndarray]]:
    """Return the states with the new arrays of a large file as views of it, so that they need no memory."""
    for row in (row for rows in plan.rows.values() for row in rows):
        row.setflags(write=False)
    path = folder / STATES
    if path.stat().st_size < MIN_MAPPED_BYTES:
        return [dict(state) for state in states]
    views = {name: list(array) for name, array in arrays_in(path, read_content(path, "checkpoint")).items()}
    stored = []
    for client, state in enumerate(states):
        known = before.states[client] if before is not None else {}
        if all(known.get(name) is array for name, array in state.items()) and all(
            plan.places[name][client, 0] != plan.step for name in state
        ):
            stored.append(dict(state))
            continue
        places = {name: plan.places[name][client] for name in state}
        stored.append({n: views[n][places[n][1]] if places[n][0] == plan.step else a for n, a in state.items()})
    return stored


def read_states(folder: Path, step: int, files: Mapping[str, Content], checksums: Mapping[str, str]) -> StoredStates:
    """Read what `write_states` has written.

    Args:
        folder: of the checkpoint.
        step: of the checkpoint.
        files: ``{file name: content}``, which has been compared with the manifest.
        checksums: ``{file name: SHA-256}`` of the manifest.

    Raises:
        UserError: the files say something that this package does not write.
    """
    names = {step: STATES} | {int(found[1]): n for n in files if (found := ROW_FILES.fullmatch(n)) and found[1]}
    rows = {s: arrays_in(folder / name, files[name]) for s, name in names.items()}
    if PLACES in files:
        places = _read_places(folder / PLACES, arrays_in(folder / PLACES, files[PLACES]), rows)
    else:
        sizes = {value.shape[0] if value.ndim else 0 for value in rows[step].values()}
        if len(sizes) != 1 or 0 in sizes:
            raise UserError("checkpoint", str(folder / STATES), "its arrays must all have one row per client")
        size = sizes.pop()
        own = np.stack([np.full(size, step), np.arange(size)], axis=1)
        places = {name: own.copy() for name in rows[step]}
    views = {s: {name: list(array) for name, array in arrays.items()} for s, arrays in rows.items()}
    num_clients = len(next(iter(places.values())))
    checked: set[tuple[int, str, int]] = set()
    states: list[dict[str, np.ndarray]] = [{} for _ in range(num_clients)]
    for name, column in places.items():
        for client, (other, row) in enumerate(column.tolist()):
            array = views[other][name][row]
            if (other, name, row) not in checked:
                checked.add((other, name, row))
                if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
                    fix = f"the array {name[:80]!r} of client {client} is not finite"
                    raise UserError("checkpoint", str(folder / names[other]), fix)
            states[client][name] = array
    return StoredStates(
        states,
        places,
        {s: folder / name for s, name in names.items()},
        {s: checksums[name] for s, name in names.items()},
        {s: sum(map(len, arrays.values())) for s, arrays in views.items()},
    )


def _read_places(
    path: Path, joined: Mapping[str, np.ndarray], rows: Mapping[int, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return ``{parameter name: [K, 2]}``, after a check that every place exists."""
    places: dict[str, np.ndarray] = {}
    for key, column in joined.items():
        if column.dtype != np.int32 or column.ndim != 2 or column.shape[1] != 2 or not len(column):
            raise UserError("checkpoint", str(path), f"the array {key[:80]!r} must be int32 [clients, 2]")
        places |= dict.fromkeys(key.split(","), column.astype(np.int64))
    if len({len(column) for column in places.values()}) != 1:
        raise UserError("checkpoint", str(path), "its arrays must all have one row per client")
    for name, column in places.items():
        for other in np.unique(column[:, 0]).tolist():
            array = rows.get(other, {}).get(name, np.zeros(0))
            here = column[column[:, 0] == other, 1]
            if not array.ndim or here.min() < 0 or here.max() >= len(array):
                fix = f"it names rows of {name[:80]!r} that step {other} does not have here"
                raise UserError("checkpoint", str(path), fix)
    return dict(sorted(places.items()))


def _joined(places: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return equal columns once, with the names of their parameters joined by commas."""
    names: dict[bytes, list[str]] = {}
    for name, column in places.items():
        names.setdefault(column.tobytes(), []).append(name)
    return {",".join(same): places[same[0]].astype(np.int32) for same in names.values()}


def _write_places(path: Path, content: bytes) -> str:
    write_atomically(path, content, durable=True)
    return hashlib.sha256(content).hexdigest()

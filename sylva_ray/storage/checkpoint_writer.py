"""Checkpoints that are written in a thread while the next stage runs.

::

    stage 6 ends ── save(6) ─────────────┐   stage 7 runs   ┌── settled() ── save(7)
                     thread:  files, manifest, old folders ──┘

At most one checkpoint is being written. Until its manifest is there, the checkpoint before it is the newest, so that a
process that is killed meanwhile loses one more stage, which a resume computes again with the same bits. An error of
the write is raised where the run next waits for it. What the file system gets is the same as without the thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.records import GameRecord, StageRecord
from sylva_ray.core.types import ClientState
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.storage.state_rows import StoredStates

MAX_BYTES_BEHIND = 2**30
"""With more new arrays, a save waits for its end: arrays that have been written need no memory, the others do."""

State = dict[str, np.ndarray]


class CheckpointWriter:
    """Writes the checkpoints of a run, one after the other. As a context, it ends with the last write.

    Args:
        folder: of the run.
        in_background: False: every save waits for its end, as a copy of the folder at a URL needs it.

    Attributes:
        stored: what the newest checkpoint holds; None: there is none.
    """

    def __init__(self, folder: RunFolder, in_background: bool = True) -> None:
        self.stored: StoredStates | None = None
        self._folder, self._in_background = folder, in_background
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._write: Future[StoredStates | None] | None = None
        self._given: list[State] = []  # the states of that write

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.settled([])

    def save(
        self,
        config: ExperimentConfig,
        states: Sequence[State],
        records: Sequence[StageRecord],
        game: GameRecord | None,
        residuals: Mapping[int, ClientState],
        always_kept: Collection[int] = (),
    ) -> list[State]:
        """Begin to write a checkpoint; see `RunFolder.save_checkpoint`.

        The arguments may change afterwards, but not the arrays and records in them.

        Args:
            config: of the run.
            states: of the K clients, as `settled` returned them.
            records: of all stages so far.
            game: what the layer game decided; None before it.
            residuals: ``{client: residual}`` of error feedback.
            always_kept: steps whose checkpoints stay.

        Returns:
            The states to go on with.

        Raises:
            OSError: this checkpoint, or the one before, could not be written.
        """
        given = self.settled(states)
        arguments = (config, given, list(records), game, dict(residuals), self.stored, tuple(always_kept))
        self._given, self._write = given, self._thread.submit(self._folder.save_checkpoint, *arguments)
        if self._in_background and self._new_bytes(given) <= MAX_BYTES_BEHIND:
            return list(given)
        return self.settled(given)

    def settled(self, states: Sequence[State]) -> list[State]:
        """Wait until the last checkpoint is complete.

        Args:
            states: of the K clients now, some of which may have been replaced since the save.

        Returns:
            The same states. Arrays that are as they were saved are those of the checkpoint: views of its files where
            these are large, so that they need no memory.

        Raises:
            OSError: the checkpoint could not be written.
        """
        current = list(states)
        if self._write is None:
            return current
        write, given, self._write, self._given = self._write, self._given, None, []
        stored = write.result()
        if stored is None:
            return current
        self.stored = stored
        for client, (now, then, kept) in enumerate(zip(current, given, stored.states, strict=False)):
            current[client] = {name: kept[name] if then.get(name) is array else array for name, array in now.items()}
        return current

    def _new_bytes(self, states: Sequence[State]) -> int:
        """Return the bytes of the arrays that the checkpoint before does not hold."""
        before = [] if self.stored is None else self.stored.states
        held = {id(array) for state in before for array in state.values()}
        new = {id(array): array.nbytes for state in states for array in state.values()}
        return sum(size for key, size in new.items() if key not in held)

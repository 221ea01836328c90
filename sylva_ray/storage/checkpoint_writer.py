"""Checkpoints whose states are written in a thread while the stage is evaluated.

::

    stage 7 trains ── begin ── evaluation, record ── complete ── observers hear of the stage
                        └─ thread: states ────────────┘ other files, manifest, old folders

The manifest comes last, after the record: a checkpoint is complete before anybody hears that the stage is over, and a
process that is killed before has lost that stage, as it has without the thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.records import GameRecord, StageRecord
from sylva_ray.core.types import ClientState
from sylva_ray.storage.checkpoint import Draft
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.storage.state_rows import StoredStates

State = dict[str, np.ndarray]


class CheckpointWriter:
    """Writes the checkpoints of a run, one after the other. As a context, it ends after what it has begun.

    Args:
        folder: of the run.

    Attributes:
        stored: what the newest checkpoint holds; None: there is none.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.stored: StoredStates | None = None
        self._folder, self._thread = folder, ThreadPoolExecutor(1, "checkpoint")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def begin(self, step: int, states: Sequence[State]) -> Future[Draft | None]:
        """Begin to write the states of a checkpoint.

        Args:
            step: position of the stage in the run, from 0.
            states: of the K clients, as the last `complete` returned them but for those that have changed. They must
                not change before the next `complete`.
        """
        return self._thread.submit(self._folder.checkpoints.begin, step, states, self.stored)

    def complete(
        self,
        begun: Future[Draft | None],
        config: ExperimentConfig,
        states: Sequence[State],
        records: Sequence[StageRecord],
        game: GameRecord | None,
        residuals: Mapping[int, ClientState],
        always_kept: Collection[int] = (),
    ) -> list[State]:
        """Wait until the states are written, and write the rest; see `RunFolder.complete_checkpoint`.

        Args:
            begun: the result of `begin`.
            config: of the run.
            states: that `begin` was given.
            records: of all stages so far.
            game: what the layer game decided; None before it.
            residuals: ``{client: residual}`` of error feedback.
            always_kept: steps whose checkpoints stay.

        Returns:
            The states to go on with: those of the checkpoint, views of its files where these are large, so that they
            need no memory. Where the checkpoint was complete already, the states that were given.

        Raises:
            OSError: it could not be written.
        """
        draft = begun.result()
        if draft is None:
            return list(states)
        self._folder.complete_checkpoint(config, draft, records, game, residuals, always_kept)
        self.stored = draft.stored
        return [dict(state) for state in draft.stored.states]

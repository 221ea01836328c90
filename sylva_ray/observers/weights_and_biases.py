"""A tracker for Weights & Biases. ``WANDB_MODE=offline`` writes files that ``wandb sync`` sends later."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from typing import Any

from sylva_ray.core.credentials import mask_value
from sylva_ray.federation.observer import Status
from sylva_ray.observers.tracker import Tracker
from sylva_ray.storage.atomic import write_atomically

LOGIN_TIMEOUT_S = 30
"""Seconds that a question for an API key waits for its answer."""


class WeightsAndBiases(Tracker):
    """Sends metrics to a project named like ``tracking.experiment``. A run that is resumed continues there."""

    def start(self, step: int) -> None:
        """See `Tracker.start`."""
        del step
        import wandb

        tracking = self.config.tracking
        self._run: Any = wandb.init(
            project=tracking.experiment,
            name=tracking.run_name or self.folder.name,
            id=self._identifier(),
            resume="allow",
            dir=str(self.folder),
            config={key: mask_value(value) for key, value in self.config.flat().items()},
            tags=[self.config.algorithm.name, *(f"{key}:{value}"[:64] for key, value in tracking.tags.items())],
            settings=wandb.Settings(silent=True, console="off", login_timeout=LOGIN_TIMEOUT_S),
        )

    def _identifier(self) -> str:
        """Return the name of the run in the project, which its run folder keeps: another run has another folder."""
        path = self.folder / "wandb" / "run_id.txt"
        if not path.exists():
            is_of_version_0_2 = path.parent.exists()  # which named the run after the path of its folder
            old_name = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, (old_name if is_of_version_0_2 else uuid.uuid4().hex[:16]) + "\n")
        return path.read_text().strip()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def finish(self, status: Status) -> None:
        """See `Tracker.finish`."""
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)

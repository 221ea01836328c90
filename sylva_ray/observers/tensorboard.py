"""A tracker for TensorBoard: event files in ``tensorboard/`` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping

from sylva_ray.core.credentials import mask_yaml
from sylva_ray.federation.observer import Status
from sylva_ray.observers.tracker import Tracker


class TensorBoard(Tracker):
    """Writes scalars, and the configuration as a text. Show several runs with ``tensorboard --logdir runs``."""

    def start(self, step: int) -> None:
        """See `Tracker.start`. Steps that an interrupted run wrote and that are run again are shown once."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step or None)  # type: ignore[no-untyped-call]
        if step == 0:
            text = mask_yaml(self.config.to_yaml())
            self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))  # type: ignore[no-untyped-call]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def finish(self, status: Status) -> None:
        """See `Tracker.finish`."""
        del status
        self._writer.close()  # type: ignore[no-untyped-call]

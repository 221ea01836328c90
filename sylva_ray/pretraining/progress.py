"""The progress of ``sylva-ray pretrain`` as lines, one per epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sylva_ray.core.text import LogFormat, duration
from sylva_ray.reports.event_lines import EventLines

if TYPE_CHECKING:
    from sylva_ray.pretraining.trainer import EpochRecord


class PretrainLog:
    """Writes a line for every epoch.

    Args:
        write: takes a line without its end.
        num_epochs: of the pre-training.
        form: of the lines, see `EventLines`; None: sentences without time stamps. Events are ``epoch``, ``notice`` and
            ``result``.
        quiet: whether to write the result only.
    """

    def __init__(
        self, write: Callable[[str], None], num_epochs: int, form: LogFormat | None = None, quiet: bool = False
    ) -> None:
        self._write, self._lines = write, EventLines(write, form) if form else None
        self._num_epochs, self._quiet = num_epochs, quiet
        self._seconds: list[float] = []

    def on_epoch(self, record: EpochRecord) -> None:
        """Write what an epoch resulted in."""
        self._seconds.append(record.seconds)
        left = sum(self._seconds) / len(self._seconds) * (self._num_epochs - record.epoch)
        count = f"{record.epoch:>{len(str(self._num_epochs))}}/{self._num_epochs}"
        numbers = f"loss {record.loss:.3f}  top1 {record.top1:.1%}  lr {record.lr:.3g}  {record.seconds:.1f} s"
        eta = f"  eta {duration(left)}" if left else ""
        values = {"loss": record.loss, "top1": record.top1, "lr": record.lr, "seconds": record.seconds}
        position = {"epoch": record.epoch, "epochs": self._num_epochs, "seconds_left": round(left, 1)}
        self._tell("epoch", f"{count}  {numbers}{eta}", **position, **values)

    def on_notice(self, text: str) -> None:
        """Write what the user should know."""
        self._tell("notice", text, text=text)

    def tell_result(self, backbone: Path) -> None:
        """Write the path of the backbone, also if quiet."""
        if self._lines is None:
            self._write(str(backbone))
        else:
            self._lines.tell("result", f"finished: {backbone}", backbone=str(backbone))

    def _tell(self, event: str, sentence: str, **values: object) -> None:
        if self._quiet:
            return
        if self._lines is None:
            self._write(sentence)
        else:
            self._lines.tell(event, sentence, **values)

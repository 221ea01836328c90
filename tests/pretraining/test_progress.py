"""What a pre-training prints."""

from __future__ import annotations

from sylva_ray.pretraining.progress import PretrainLog
from sylva_ray.pretraining.trainer import EpochRecord


def test_every_epoch_of_a_pre_training_is_counted() -> None:
    lines: list[str] = []
    log = PretrainLog(lines.append, 10)
    log.on_epoch(EpochRecord(epoch=9, loss=2.0, top1=0.5, lr=1e-3, seconds=3.0))
    log.on_epoch(EpochRecord(epoch=10, loss=1.0, top1=0.75, lr=1e-3, seconds=3.0))
    assert lines == [
        " 9/10  loss 2.000  top1 50.0%  lr 0.001  3.0 s  eta 3 s",
        "10/10  loss 1.000  top1 75.0%  lr 0.001  3.0 s",
    ]

"""Part 6: two processes that share the device, against one that has it alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.lab import Lab, Line
from benchmarks.gpu.speed import task_of

SCRIPT = Path(__file__).parents[1] / "gpu_proof.py"
SHARE = 0.45
"""Of the device's memory, for each of two processes."""


def sharing(lab: Lab) -> Iterator[Line]:
    """Yield the speeds of one process, and of two side by side."""
    alone, both = _together(lab, 1), _together(lab, 2)
    yield {
        "item": f"two processes of {SHARE} against one",
        "images_per_s_alone": round(alone[0], 1),
        "images_per_s_each": [round(rate, 1) for rate in both],
        "ratio": round(sum(both) / alone[0], 2),
    }


def _together(lab: Lab, count: int) -> list[float]:
    """Return the images per second of ``count`` processes that start at about the same time."""
    command = [sys.executable, str(SCRIPT), "--device", lab.device, "--load", *["--reduced"] * lab.reduced]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    answers = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise RuntimeError(f"a process that shared the device ended with exit code {process.returncode}")
    return [float(json.loads(answer.splitlines()[-1])["images_per_s"]) for answer in answers]


def load(lab: Lab) -> Line:
    """Train for some seconds within a share of the device's memory, and return the images per second."""
    if lab.is_cuda:
        torch.cuda.set_per_process_memory_fraction(SHARE)
    backbone, counts = ("vit_micro", (2, 2)) if lab.reduced else ("vit_small_patch16_224", (16,) * 4)
    experiment = task_of(lab, backbone, "float32", counts, 1 if lab.reduced else 10)
    experiment.trained()
    images, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < (0.5 if lab.reduced else 6):
        experiment.trained()
        lab.synchronise()
        images += sum(counts)
    return {"images_per_s": images / elapsed}

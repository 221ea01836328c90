"""A run in this process needs no Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]

CODE = """
import builtins, sys

imported = builtins.__import__

def without(name, *arguments, **options):
    if name.split(".")[0] in ("ray", "mlflow"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return imported(name, *arguments, **options)

builtins.__import__ = without
import sylva_ray

sylva_ray.run("digits", sys.argv[2:], out=sys.argv[1], show="nothing")
"""

SETTINGS = """
cluster.pool=in_process tracking.enabled=false algorithm.name=undefended
dataset.max_train=40 dataset.max_test=20 partition.num_clients=2 partition.min_samples=8 partition.test_samples=2
attack.steps=1 training.rounds=1 training.precision=float32 training.attention=fused
evaluation.precision=float32 evaluation.attacks=[{name:fgsm,epsilon:4/255}]
"""


def test_a_run_in_this_process_needs_neither_ray_nor_mlflow(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [setting.replace(":", ": ") for setting in SETTINGS.split()]  # YAML wants a space
    command = [sys.executable, "-c", CODE, str(out), *settings]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert (out / "summary.json").exists()

"""The proof on a GPU works the first time: its code runs on the CPU, without Ray and without MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_proof
from benchmarks.gpu.bits import digests
from benchmarks.gpu.lab import Lab, relative
from benchmarks.gpu.right import STACKS, UPDATES, VALUES, stack_against_single, updates, values
from benchmarks.gpu.speed import divided

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_proof.py"
LAB = Lab("cpu", reduced=True)

NOT_NEEDED = "ray mlflow sklearn scipy pandas pyarrow matplotlib peft optuna threadpoolctl typer rich s3fs jsonschema"
"""What the proof may not import: it runs where only torch, timm, numpy and pydantic are installed."""

WITHOUT = """
import builtins, runpy, sys

imported, missing = builtins.__import__, {missing!r}

def without(name, *arguments, **options):
    if name.split(".")[0] in missing:
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return imported(name, *arguments, **options)

builtins.__import__ = without
sys.argv = {argv!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not missing & set(sys.modules)
"""


def in_a_bare_environment(*arguments: object) -> list[dict[str, Any]]:
    """The lines of a process of the proof in which nothing can be imported that it does not need."""
    argv = [str(SCRIPT), "--device", "cpu", "--reduced", *map(str, arguments)]
    code = WITHOUT.format(missing=set(NOT_NEEDED.split()), argv=argv)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_needs_torch_timm_numpy_and_pydantic_alone() -> None:
    lines = in_a_bare_environment("--child", "--parts", 0)
    assert [line["item"] for line in lines if "item" in line][:2] == ["versions", "hardware"]
    assert not [line for line in lines if "error" in line]


@pytest.mark.parametrize("name", ["logits", "by_image", "by_adapter"])
def test_values_are_those_of_float64(name: str) -> None:
    found, expected = values(LAB.experiment(), torch.float32), values(LAB.experiment(), torch.float64)
    assert 0 < relative(getattr(found, name), getattr(expected, name)) <= VALUES


def test_optimiser_steps_are_those_of_float64_and_of_clients_alone() -> None:
    counts = (24, 1, 12)
    found = updates(LAB.experiment(counts), torch.float32)
    assert 0 < relative(found, updates(LAB.experiment(counts), torch.float64)) <= UPDATES
    assert stack_against_single(LAB) <= STACKS


def test_the_parts_of_a_task_are_timed() -> None:
    """Their names are those of functions elsewhere, which may change theirs."""
    line = divided(LAB, "vit_micro", (2, 1), 1)
    parts = {name: line[name] for name in ("batches", "attack", "gradients", "optimiser")}
    assert all(value > 0 for value in parts.values())
    assert sum(parts.values()) <= line["ms"]


@pytest.mark.slow
def test_equal_inputs_give_equal_bits() -> None:
    assert digests(LAB) == digests(LAB)


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path: Path, monkeypatch: Any) -> None:
    """A process that dies in part 1, hangs in part 2 and ends part 3 with an error is followed by others."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys, time\n"
        "emit = lambda **line: print(json.dumps(line), flush=True)\n"
        "for part in map(int, sys.argv[sys.argv.index('--parts') + 1:]):\n"
        "    emit(part=part, starts=True)\n"
        "    emit(part=part, item=f'first of {part}', holds=True)\n"
        "    if part == 1: os._exit(9)\n"
        "    if part == 2: time.sleep(60)\n"
        "    if part == 3: emit(part=part, ended=True, error='ValueError: no'); break\n"
        "    emit(part=part, item='product', tflops=0.25, holds=part < 5)\n"
        "    emit(part=part, ended=True)\n"
    )
    monkeypatch.setattr(gpu_proof, "__file__", str(child))
    monkeypatch.setattr(gpu_proof, "CPU_PATIENCE", 1)
    monkeypatch.setattr(gpu_proof, "LIMITS", dict.fromkeys(range(8), 10) | {2: 2})
    lines = list(gpu_proof.proof("cpu", True, [0, 1, 2, 3, 4, 5]))
    ends = {line["part"]: line.get("error") for line in lines if "ended" in line}
    assert ends == {
        **{0: None, 1: "exit code 9: ", 2: "took longer than 2 s"},
        **{3: "ValueError: no", 4: None, 5: None},
    }
    assert [line["part"] for line in lines if line.get("item", "").startswith("first")] == [0, 1, 2, 3, 4, 5]
    assert gpu_proof.failures(lines) == [
        *("1 everything runs", "2 the values are right", "3 the same bits"),
        "5 product",
    ]
    text = gpu_proof.table(lines)
    assert "| 2 | the values are right | took longer than 2 s | **no** |" in text
    assert "| 4 | product | tflops 0.25 | yes |" in text
    assert text.splitlines()[-1].startswith("9 criteria judged; FAILED: 1 everything runs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True)
    assert "no GPU" in json.loads(done.stdout)["skipped"]


@pytest.mark.slow
def test_the_whole_proof_runs_on_a_cpu_in_a_bare_environment() -> None:
    lines = in_a_bare_environment("--child", "--parts", *range(8))
    assert [line["part"] for line in lines if "ended" in line] == list(range(8))
    assert gpu_proof.failures([line for line in lines if "starts" not in line]) == []

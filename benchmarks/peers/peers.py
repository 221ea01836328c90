"""Compare the same client work in Flower, in a plain loop and here.

    python benchmarks/peers/peers.py --data ../shared/data/cifar10 [--work 32x64x3 100x20x3] [--repeats 3]

A work is CLIENTSxIMAGESxSTEPS: each client fine-tunes adapters and a personal head for one epoch on its images,
attacked by PGD of so many steps (0: benign), and the adapters are averaged. Systems:

* flower: its simulation engine with the model built in every call, as its examples do;
* flower cached: the same with a model per process;
* plain: timm, PEFT and a pool of processes, no framework (`plain.py`);
* ours: `sylva_ray` with Ray actors;
* plain bfloat16, ours bfloat16: the last two with passes in bfloat16, which `training.precision: auto` chooses on
  processors with instructions for it. Systems without that word work in float32.

All have two processes with one thread each. Five rounds are run; the second to the fourth are counted, from the begin
of one to the begin of the next, so that everything between counts, here also records and checkpoints. CPU seconds are
those of the whole machine, and memory is what it uses above the start: nothing else may run on it. A start ends with
the begin of round 1; here the workers are ready then, elsewhere they start within round 1, which is not counted.

Systems alternate; results are appended to results.jsonl, and medians are printed. Flower gets an environment of its own
in build/peers, because its pins exclude ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sylva_ray.config.data import DatasetSection
from sylva_ray.data.datasets import load_dataset
from sylva_ray.models.shipped import SHIPPED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.jsonl"
FLOWER_PYTHON = ROOT / "build" / "peers" / "flower" / "bin" / "python"
FLOWER_PACKAGES = ("flwr[simulation]==1.42.0", "psutil")
SAME_PACKAGES = ("torch", "timm", "peft", "safetensors")
"""Of Flower's environment, in the versions of this one."""

WORKS = ("32x64x3", "100x20x3", "32x64x0", "1000x20x1")
SYSTEMS = ("flower", "flower cached", "plain", "ours", "plain bfloat16", "ours bfloat16")
ROUNDS, COUNTED = 5, 3
TIMEOUT_S = 3600


def make_flower() -> None:
    """Make Flower's environment."""
    same = [f"{name}=={version(name).partition('+')[0]}" for name in SAME_PACKAGES]
    uv = [sys.executable, "-m", "uv"]
    if not FLOWER_PYTHON.exists():
        subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, FLOWER_PYTHON.parents[1]], check=True)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", FLOWER_PYTHON, *FLOWER_PACKAGES, *same], check=True)


def write_images(data: Path, count: int, path: Path) -> None:
    """Write ``count`` training images for those that do not read parquet."""
    section = DatasetSection(name=f"parquet:{data}", max_train=count, max_test=100)
    train = load_dataset(section, image_size=32, seed=0).train
    np.savez(path, images=train.images, labels=train.labels)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Sample the memory that is used on the machine; the list holds the peak above the start, in bytes."""
    before, peak, stop = psutil.virtual_memory().available, [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.2):
            peak[0] = max(peak[0], before - psutil.virtual_memory().available)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()


def measure(system: str, work: str, environment: dict[str, str], scratch: Path) -> dict[str, Any]:
    """Run a system once.

    Returns:
        ``start_s`` from the begin of the command to that of the first round; ``wall_s``, ``cpu_s`` of a counted round;
        ``peak_gb`` of the command.
    """
    clients, images, steps = work.split("x")
    script, python = {
        "flower": ("flower.py", FLOWER_PYTHON),
        "flower cached": ("flower.py", FLOWER_PYTHON),
        "plain": ("plain.py", Path(sys.executable)),
        "ours": ("ours.py", Path(sys.executable)),
    }[system.removesuffix(" bfloat16")]
    marks_file = scratch / "marks.json"
    marks_file.unlink(missing_ok=True)
    command = [str(python), str(HERE / script), clients, images, steps, str(ROUNDS), str(marks_file)]
    options = {"PEERS_PRECISION": "bfloat16" if system.endswith("bfloat16") else "float32"}
    if system == "flower cached":
        options["PEERS_CACHED"] = "1"
    with peak_memory() as peak, open(scratch / "log", "w") as log:
        started = time.time()
        done = subprocess.run(
            command, env=environment | options, stdout=log, stderr=log, timeout=TIMEOUT_S, cwd=HERE, check=False
        )
    if done.returncode or not marks_file.exists():
        raise SystemExit(f"{system} failed:\n{(scratch / 'log').read_text()[-3000:]}")
    marks = json.loads(marks_file.read_text())
    assert len(marks) == ROUNDS, f"{system} marked {len(marks)} rounds"
    first, last = marks[1], marks[1 + COUNTED]
    return {
        "system": system,
        "work": work,
        "start_s": marks[0]["time"] - started,
        "wall_s": (last["time"] - first["time"]) / COUNTED,
        "cpu_s": (last["cpu"] - first["cpu"]) / COUNTED,
        "peak_gb": peak[0] / 1e9,
    }


def _row(group: tuple[tuple[str, str], object]) -> tuple[int, str, int]:
    (work, system), _ = group
    return WORKS.index(work) if work in WORKS else len(WORKS), work, SYSTEMS.index(system)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the medians as a Markdown table; wall seconds also as a multiple of ours."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["work"], result["system"]].append(result)
    lines = [
        "| work | system | runs | wall s a round | times ours | CPU s a round | start, s | peak memory, GB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (work, system), group in sorted(groups.items(), key=_row):
        wall, cpu, start, peak = (
            statistics.median(run[key] for run in group) for key in ("wall_s", "cpu_s", "start_s", "peak_gb")
        )
        own = groups.get((work, "ours"))
        ratio = f"{wall / statistics.median(run['wall_s'] for run in own):.2f}" if own else ""
        cells = (work, system, len(group), f"{wall:.1f}", ratio, f"{cpu:.1f}", f"{start:.1f}", f"{peak:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the medians of all results so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of parquet files with CIFAR-10")
    parser.add_argument("--work", nargs="+", default=WORKS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    if given.data is None and not given.table:
        parser.error("--data is missing")
    if not given.table:
        if any(system.startswith("flower") for system in given.systems):
            make_flower()
        backbone = SHIPPED["vit_micro"]
        environment = dict(os.environ) | {
            "PEERS_PARQUET": str(given.data.resolve()),
            "PEERS_BACKBONE": json.dumps(
                {
                    "options": dict(backbone.architecture.arguments),
                    "mean": backbone.architecture.mean,
                    "std": backbone.architecture.std,
                    "file": str(backbone.checkpoint),
                }
            ),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        }
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            count = max(int(clients) * int(images) for clients, images, _ in (work.split("x") for work in given.work))
            environment["PEERS_DATA"] = str(scratch / "images.npz")
            write_images(given.data, count, scratch / "images.npz")
            for work in given.work:
                for repeat in range(given.repeats):
                    for system in given.systems if repeat % 2 == 0 else reversed(given.systems):
                        result = measure(system, work, environment, scratch)
                        print(json.dumps(result), flush=True)
                        with open(given.results, "a") as file:
                            file.write(json.dumps(result) + "\n")
    print(table([json.loads(line) for line in given.results.read_text().splitlines()]))


if __name__ == "__main__":
    main()

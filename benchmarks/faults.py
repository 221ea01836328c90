"""Kill a client actor every 20 s: does the fleet end with the same adapters, and how much time is lost?

    python benchmarks/faults.py --data ../shared/data/cifar10 [--clients 1000] [--rounds 2] [--every 20]

The same run twice, on a Ray of its own with as many actors as this machine has cores: 20 images for each of 1,000
clients, PGD-1, two rounds with everybody and a local epoch; a test image per client at the end. In the second run a
client actor that works on a task is ended by SIGKILL every 20 s. Work is lost with each: the part of
its task that was done, and the seconds until an actor that takes its place works. Both are seen from outside, by the
titles that Ray gives to its processes. Divided by the actors, that is what the kills explain of the longer time; the
rest is what recovery costs on top.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from sylva_ray import load_run
from sylva_ray.storage.run_folder import RunFolder

IMAGES_PER_CLIENT = 20
WORKING = "ray::ClientActor.run"
"""Title of an actor's process while it works on a task."""

POLL_S = 0.2


@dataclass
class Losses:
    """What was ended, and what was seen of the work lost.

    Attributes:
        tasks: seconds that the tasks of the actors that were ended had taken, or more: an actor that takes its next
            task within `POLL_S` seems to go on with the one before.
        replacements: seconds from the end of an actor until as many worked as before.
    """

    tasks: list[float] = field(default_factory=list)
    replacements: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of work of one actor."""
        return sum(self.tasks) + sum(self.replacements)


def settings(given: argparse.Namespace, num_actors: int) -> list[str]:
    """Return the changes of configs/cifar10.yaml."""
    return [
        f"dataset.name=parquet:{given.data.resolve()}",
        f"dataset.max_train={IMAGES_PER_CLIENT * given.clients}",
        "dataset.max_test=200",
        *("partition.kind=iid", f"partition.num_clients={given.clients}", "partition.min_samples=5"),
        *("partition.test_samples=1", "partition.valid_fraction=0.1"),
        *("algorithm.name=sylva", "algorithm.head_warmup_epochs=0", "algorithm.mixture.enabled=false"),
        *("algorithm.phase2.enabled=false", "attack.steps=1"),
        *(f"training.rounds={given.rounds}", "training.batch_size=20", "training.cohort_size=8"),
        *("training.precision=float32", "training.attention=fused", "training.augment=none"),
        *("evaluation.initial=false", "evaluation.attacks=[]", "evaluation.checks=false"),
        *("evaluation.precision=float32", "tracking.enabled=false", "cluster.max_exported=0"),
        f"cluster.num_actors={num_actors}",
    ]


def working_actors(driver: psutil.Process) -> dict[int, psutil.Process]:
    """Return the descendants of the driver that work on a client's task now, by process id."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for process in driver.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(WORKING):
                    found[process.pid] = process
    return found


def run(changes: list[str], folder: Path, num_actors: int, every: float | None) -> Losses:
    """Run the experiment; end an actor every so many seconds, from the first task on; None: end none."""
    recipe = Path(__file__).parents[1] / "configs" / "cifar10.yaml"
    command = [sys.executable, "-m", "sylva_ray.cli", "run", str(recipe), *changes, "--out", str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    losses, since, draw = Losses(), dict[int, float](), random.Random(0)
    due, waiting = None, None
    while child.poll() is None:
        now, actors = time.monotonic(), working_actors(psutil.Process(child.pid))
        since = {pid: since.get(pid, now) for pid in actors}
        due = now + every if due is None and every and actors else due
        if waiting is not None and len(actors) >= num_actors:
            losses.replacements.append(now - waiting)
            waiting = None
        if due is not None and every and now >= due and waiting is None and len(actors) == num_actors:
            chosen = draw.choice(sorted(actors))
            actors[chosen].kill()
            losses.tasks.append(now - since.pop(chosen))
            due, waiting = now + every, now
        time.sleep(POLL_S)
    if child.returncode != 0:
        raise SystemExit(f"the run ended with {child.returncode}")
    return losses


def stage_seconds(folder: Path) -> float:
    """Return the wall seconds of all stages, start-up and the report apart."""
    return sum(record.seconds["wall"] for record in RunFolder(folder).load_records())


def equal_states(one: Path, other: Path) -> bool:
    """Return whether two runs end with the same bits."""
    pairs = zip(load_run(one).states, load_run(other).states, strict=True)
    return all(
        mine.keys() == yours.keys() and all(np.array_equal(mine[name], yours[name]) for name in mine)
        for mine, yours in pairs
    )


def main() -> None:
    """Run both, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of parquet files with CIFAR-10")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    given = parser.parse_args()
    num_actors = max(2, os.cpu_count() or 2)
    changes = settings(given, num_actors)
    with tempfile.TemporaryDirectory() as scratch:
        quiet, disturbed = Path(scratch) / "quiet", Path(scratch) / "disturbed"
        run(changes, quiet, num_actors, None)
        print(f"undisturbed: {stage_seconds(quiet):.1f} s in stages, {num_actors} actors", flush=True)
        losses = run(changes, disturbed, num_actors, given.every)
        explained = stage_seconds(quiet) + losses.seconds / num_actors
        print(
            f"{len(losses.tasks)} actors ended: {stage_seconds(disturbed):.1f} s in stages; "
            f"lost {sum(losses.tasks):.1f} s of tasks and {sum(losses.replacements):.1f} s until actors worked again, "
            f"which explain {explained:.1f} s; {stage_seconds(disturbed) / explained:.3f} of that"
        )
        print("the same adapters" if equal_states(quiet, disturbed) else "OTHER ADAPTERS")


if __name__ == "__main__":
    main()

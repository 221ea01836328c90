"""Measure CPU seconds from `sylva-ray run` until its client actors get their first tasks, by the role of the process.

    python benchmarks/startup.py [--actors N] [--runs N] [--bytecode DIR]

The command runs the digits for one short round in a new folder, on a Ray of its own. Every 50 ms, the user and system
time of its processes is read; the command line tells the role of each (Ray names workers after what they do). The start
of an actor ends when its title says that it runs a task, that of all other processes when the last actor's does. The
whole command is reported as well, to show what was only postponed.

Most of a start is importing modules, and most of an import is compiling, where bytecode does not exist and cannot be
written (``PYTHONDONTWRITEBYTECODE``, a read-only installation). ``--bytecode DIR`` keeps bytecode in DIR and runs the
command once before it measures: the difference is what compiling costs. To see where an import's seconds go, run
``python -X importtime -c "import sylva_ray.execution.ray.client_actor"``.

The numbers depend on the machine and its load: compare checkouts (named by ``PYTHONPATH``) on one machine, in turns.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
SHORT = ["training.rounds=1", "evaluation.attacks=[]", "algorithm.phase2.enabled=false", "dataset.max_train=200"]
POLL_S = 0.05

ROLES = {
    "gcs_server": "Ray: gcs",
    "raylet/raylet": "Ray: raylet",
    "dashboard/dashboard": "Ray: dashboard",
    "autoscaler.*monitor": "Ray: autoscaler monitor",
    "log_monitor": "Ray: log monitor",
    "dashboard/agent|ray::DashboardAgent": "Ray: dashboard agent",
    "runtime_env/agent|ray::RuntimeEnvAgent": "Ray: environment agent",
    "ray::Coordinator": "coordinator",
    "ray::ClientActor": "client actors",
    "ray::|default_worker": "idle workers",
    "sylva-ray": "driver",
}
"""Roles by patterns of command lines; the first match counts."""

FIRST_TASK = "ray::ClientActor.run"


@dataclass
class Seen:
    """A process when it was last read; ``start`` is its CPU time at the end of its own start."""

    role: str = "others"
    seconds: float = 0.0
    start: float | None = None


@dataclass(frozen=True)
class Costs:
    """CPU seconds by role and wall seconds of one command, of its start and in all."""

    start: dict[str, float]
    start_wall: float
    whole: dict[str, float]
    whole_wall: float


def main() -> None:
    """Measure and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument(
        "--bytecode", type=Path, metavar="DIR", help="keep bytecode there, and fill it before measuring"
    )
    given = parser.parse_args()
    environment = dict(os.environ)
    if given.bytecode is not None:
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(given.bytecode.absolute())
        measure(given.actors, environment)
    costs = [measure(given.actors, environment) for _ in range(given.runs)]
    print(f"{'':<24}{'start':>8}{'whole command':>16}")
    for role in sorted({role for cost in costs for role in cost.whole}):
        show(role, [cost.start.get(role, 0.0) for cost in costs], [cost.whole.get(role, 0.0) for cost in costs])
    show("CPU seconds", [sum(cost.start.values()) for cost in costs], [sum(cost.whole.values()) for cost in costs])
    show("wall seconds", [cost.start_wall for cost in costs], [cost.whole_wall for cost in costs])


def show(name: str, start: list[float], whole: list[float]) -> None:
    """Print one line of medians."""
    print(f"{name:<24}{statistics.median(start):>8.1f}{statistics.median(whole):>16.1f}")


def measure(num_actors: int, environment: dict[str, str]) -> Costs:
    """Run the command once and read the times of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(sys.executable).with_name("sylva-ray"))
        command = [script, "run", str(CONFIG), *SHORT, f"cluster.num_actors={num_actors}", "--out", f"{folder}/run"]
        started = time.perf_counter()
        # in another folder, as a checkout in the current one would take precedence over the one in PYTHONPATH
        child = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        seen: dict[int, Seen] = defaultdict(Seen)
        start: dict[str, float] = {}
        start_wall = 0.0
        while child.poll() is None:
            read_times(child.pid, seen)
            if not start and sum(process.start is not None for process in seen.values()) == num_actors:
                start, start_wall = by_role(seen, start=True), time.perf_counter() - started
            time.sleep(POLL_S)
    if child.returncode != 0 or not start:
        raise SystemExit(f"the command ended with {child.returncode}; not all of {num_actors} actors were seen at work")
    return Costs(start, start_wall, by_role(seen), time.perf_counter() - started)


def read_times(pid: int, seen: dict[int, Seen]) -> None:
    """Update role and CPU seconds of ``pid`` and its descendants; those that have ended keep their last values."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:  # it has just ended
            continue
        entry = seen[process.pid]
        entry.role = next((role for pattern, role in ROLES.items() if re.search(pattern, title)), entry.role)
        entry.seconds = times.user + times.system
        if entry.start is None and title.startswith(FIRST_TASK):
            entry.start = entry.seconds


def by_role(seen: dict[int, Seen], start: bool = False) -> dict[str, float]:
    """Sum the seconds by role, of the starts or of everything."""
    sums: dict[str, float] = defaultdict(float)
    for entry in seen.values():
        sums[entry.role] += entry.start if start and entry.start is not None else entry.seconds
    return dict(sums)


if __name__ == "__main__":
    main()

"""CPU seconds from `sylva-ray run` until its client actors get their first tasks, by the role of the process.

    python benchmarks/startup.py [--actors N] [--runs N] [--bytecode DIR]

The command runs the digits for one short round in a fresh folder, on a Ray of its own. Its processes are looked at every 50 ms;
each counts with its user and system time under the role that its command line tells (Ray names workers after what they do). An
actor's start ends when its title says that it runs a task, everybody else's when the last actor's does. The whole command is
reported, too: there shows what was only put off.

Most of a start is importing modules, and most of an import is compiling them where no bytecode lies beside the sources and none
may be written (``PYTHONDONTWRITEBYTECODE``, a read-only installation). ``--bytecode DIR`` lets Python keep it in DIR and runs the
command once before it measures: the difference is what compiling costs. Where an import's seconds go is told by
``python -X importtime -c "import sylva_ray.execution.ray.client_actor"``.

The numbers depend on the machine and on what else it does: compare checkouts (named by ``PYTHONPATH``) on the same one, in turns.
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
"""What a command line tells of a process; the first pattern found counts."""

FIRST_TASK = "ray::ClientActor.run"


@dataclass
class Seen:
    """A process as last seen; ``start`` is what it had used when its own start was over."""

    role: str = "others"
    seconds: float = 0.0
    start: float | None = None


@dataclass(frozen=True)
class Costs:
    """Of one command: CPU seconds by role and wall seconds, of the start and altogether."""

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
    """One line of medians."""
    print(f"{name:<24}{statistics.median(start):>8.1f}{statistics.median(whole):>16.1f}")


def measure(num_actors: int, environment: dict[str, str]) -> Costs:
    """Run the command once and watch its processes."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(sys.executable).with_name("sylva-ray"))
        command = [script, "run", str(CONFIG), *SHORT, f"cluster.num_actors={num_actors}", "--out", f"{folder}/run"]
        started = time.perf_counter()
        # elsewhere, because a checkout in the current directory would go before the one that PYTHONPATH names
        child = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        seen: dict[int, Seen] = defaultdict(Seen)
        start: dict[str, float] = {}
        start_wall = 0.0
        while child.poll() is None:
            look(child.pid, seen)
            if not start and sum(process.start is not None for process in seen.values()) == num_actors:
                start, start_wall = by_role(seen, start=True), time.perf_counter() - started
            time.sleep(POLL_S)
    if child.returncode != 0 or not start:
        raise SystemExit(f"the command ended with {child.returncode}; not all of {num_actors} actors were seen at work")
    return Costs(start, start_wall, by_role(seen), time.perf_counter() - started)


def look(pid: int, seen: dict[int, Seen]) -> None:
    """Note role and CPU seconds of ``pid`` and all below it; who has gone keeps what was last seen."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:  # just gone
            continue
        own = seen[process.pid]
        own.role = next((role for pattern, role in ROLES.items() if re.search(pattern, title)), own.role)
        own.seconds = times.user + times.system
        if own.start is None and title.startswith(FIRST_TASK):
            own.start = own.seconds


def by_role(seen: dict[int, Seen], start: bool = False) -> dict[str, float]:
    """Sums, of the starts or of everything."""
    sums: dict[str, float] = defaultdict(float)
    for own in seen.values():
        sums[own.role] += own.start if start and own.start is not None else own.seconds
    return dict(sums)


if __name__ == "__main__":
    main()

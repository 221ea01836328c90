"""Kill runs in every way, resume them, and compare what they leave with an undisturbed run, bit for bit.

    python scripts/chaos.py                       50 faults, about 30 minutes on two cores
    python scripts/chaos.py --faults 3 --only client,sigterm

Each fault meets a run of its own at a random moment: the start, between two operations, or within a stage. A run
survives if it ends by itself or after ``--resume`` (after ``sylva-ray repair``, where the line says so), with the same
adapters and client states; if every command that failed said in one line how to go on, without a traceback; and if no
process of it is alive half a minute after any end.

Faults on Ray: ``client`` and ``coordinator`` (SIGKILL), ``stop_client`` and ``stop_coordinator`` (SIGSTOP: they hang),
``raylet``, ``gcs`` and ``gcs_at_start`` (SIGKILL of Ray's services), ``driver`` (SIGKILL), ``sigterm``, ``sigint``. In
one process: ``kill``, ``terminate``, ``interrupt``, ``full_disk`` (a limit on the size of files), ``torn`` (a kill,
then a file cut in half).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from sandbox import ROOT, SMALL, SYLVA

from sylva_ray.storage.manifest import MANIFEST, folder_name
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.storage.state_rows import STATES

CHANGES = [
    *SMALL,
    *("training.rounds=2", "lora.rank=2", "evaluation.attacks.0.steps=2"),
    "algorithm.phase2={benign_epochs: 1, refine_epochs: 1, attack_steps: 2, max_images: 4}",
    *("cluster.num_actors=1", "cluster.hang_timeout_s=8"),
]
"""Changes of configs/digits.yaml."""

LAST_STEP = 5
"""Position of the last stage of this run, whose checkpoint is ``round_0005``."""

MAX_SECONDS = 240
"""A command that takes longer is lost."""

ORPHAN_SECONDS = 30
"""How long a process of a run may outlive it."""

MAX_FILE_BYTES = 60_000
"""Limit of ``full_disk``: records fit, the states of three clients do not."""

NAMES = {"client": "ray::ClientActor", "coordinator": "ray::Coordinator", "raylet": "raylet", "gcs": "gcs_server"}
"""How the processes of Ray are called."""


REPAIR = "sylva-ray repair"
"""The command that a line may name before ``--resume`` goes on."""


class LostError(Exception):
    """A run did not survive; says why."""


@dataclass
class Command:
    """A run in a process of its own.

    Attributes:
        process: its driver.
        family: all of its descendants that were seen, and itself.
        log: file with its standard error.
    """

    process: subprocess.Popen[bytes]
    log: Path
    family: set[psutil.Process] = field(default_factory=set)

    @classmethod
    def start(cls, folder: Path, pool: str, resume: bool, limit: int | None = None) -> Command:
        """Start ``sylva-ray run`` for the run ``folder/run``; ``limit`` is the largest file in bytes."""
        arguments = [*SYLVA, "run", str(ROOT / "configs/digits.yaml"), *CHANGES, f"cluster.pool={pool}"]
        arguments += ["--out", str(folder / "run"), *(["--resume"] if resume else [])]
        log = folder / "stderr.txt"

        def limit_files() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        with open(log, "wb") as errors:
            process = subprocess.Popen(
                arguments, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=limit_files, start_new_session=True
            )
        return cls(process, log)

    def look(self) -> None:
        """Remember the processes that exist now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            self.family |= {parent, *parent.children(recursive=True)}

    def wait_for(self, is_time: Callable[[], bool]) -> bool:
        """Wait until it is time, or the command has ended; return whether it is time."""
        end = time.monotonic() + MAX_SECONDS
        while not is_time():
            self.look()
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise LostError(f"nothing happened for {MAX_SECONDS} s")
            time.sleep(0.02)
        return True

    def find(self, kind: str) -> psutil.Process | None:
        """Return a process of Ray by its kind, or None."""
        self.look()
        for process in self.family:
            with contextlib.suppress(psutil.Error):
                if process.name().startswith(NAMES[kind]) or process.cmdline()[0].endswith(NAMES[kind]):
                    return process
        return None

    def end(self) -> int:
        """Wait for the end, check what it said and that nothing of it is left; return the exit code.

        Raises:
            LostError: it hangs, ended with a traceback or without the line, or left a process.
        """
        if not self.wait_for(lambda: self.process.poll() is not None):
            pass
        code = self.process.wait()
        for process in self.family:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
        self._check_orphans()
        said = self.log.read_text(errors="replace").strip()
        if "Traceback" in said:
            raise LostError(f"exit {code} with a traceback: {said.splitlines()[-1][:200]}")
        last = (said.splitlines() or [""])[-1]
        is_claimed = RunFolder(self.log.parent / "run").config_file.exists()
        says_how = not is_claimed or "--resume" in last or REPAIR in last
        if code != 0 and not (last.startswith("sylva-ray: ") and says_how):
            raise LostError(f"exit {code} without a line that says how to go on: {said[-200:]!r}")
        if code != 0 and REPAIR in last:
            subprocess.run([*SYLVA, *REPAIR.split()[1:], str(self.log.parent / "run")], check=True, capture_output=True)
        return code

    def _check_orphans(self) -> None:
        _, alive = psutil.wait_procs(list(self.family), timeout=ORPHAN_SECONDS)
        names = []
        for process in alive:
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    names.append(" ".join(process.cmdline())[:80])
                    process.kill()
        if names:
            raise LostError(f"{len(names)} processes left after {ORPHAN_SECONDS} s, e.g. {names[0]}")

    def kill(self) -> None:
        """End everything that is left of it."""
        for process in self.family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()


def on_process(kind: str, signum: signal.Signals) -> Callable[[Command], None]:
    """Return a fault that sends a signal to one process of Ray; none, where it has gone already."""

    def strike(command: Command) -> None:
        target = command.find(kind)
        if target is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                target.send_signal(signum)

    return strike


def on_driver(signum: signal.Signals) -> Callable[[Command], None]:
    """Return a fault that sends a signal to the command itself."""
    return lambda command: command.process.send_signal(signum)


STRIKES: dict[str, Callable[[Command], None]] = {
    "client": on_process("client", signal.SIGKILL),
    "coordinator": on_process("coordinator", signal.SIGKILL),
    "stop_client": on_process("client", signal.SIGSTOP),
    "stop_coordinator": on_process("coordinator", signal.SIGSTOP),
    "raylet": on_process("raylet", signal.SIGKILL),
    "gcs": on_process("gcs", signal.SIGKILL),
    "gcs_at_start": on_process("gcs", signal.SIGKILL),
    "driver": on_driver(signal.SIGKILL),
    "sigterm": on_driver(signal.SIGTERM),
    "sigint": on_driver(signal.SIGINT),
    "kill": on_driver(signal.SIGKILL),
    "terminate": on_driver(signal.SIGTERM),
    "interrupt": on_driver(signal.SIGINT),
    "full_disk": Command.look,  # the limit is set when it starts
    "torn": on_driver(signal.SIGKILL),
}
IN_PROCESS = ("kill", "terminate", "interrupt", "full_disk", "torn")


def disturbed_run(kind: str, folder: Path, rng: random.Random) -> str:
    """Start a run, strike it, and resume it until it has finished; return what happened in words.

    Raises:
        LostError: see the module.
    """
    pool = "in_process" if kind in IN_PROCESS else "ray"
    run = RunFolder(folder / "run")
    command = Command.start(folder, pool, resume=False, limit=MAX_FILE_BYTES if kind == "full_disk" else None)
    try:
        step, delay = rng.randint(-1, LAST_STEP - 1), rng.uniform(0, 1.5)
        if kind == "gcs_at_start":
            moment = "at the start"
            command.wait_for(lambda: command.find("gcs") is not None)
        elif kind == "full_disk":
            moment = f"with files of at most {MAX_FILE_BYTES:,} bytes"
        else:
            moment = f"{delay:.1f} s after " + ("config.yaml" if step < 0 else f"step {step}")
            sign = run.config_file if step < 0 else run.checkpoints.root / folder_name(step) / MANIFEST
            if command.wait_for(sign.exists):
                until = time.monotonic() + delay
                command.wait_for(lambda: time.monotonic() > until)
        STRIKES[kind](command)
        codes = [command.end()]
        if kind == "torn":
            moment += f", {tear(run, rng)} cut in half"
        while codes[-1] != 0 and len(codes) < 4:
            command = Command.start(folder, pool, resume=run.config_file.exists())
            codes.append(command.end())
    finally:
        command.kill()
    if codes[-1] != 0:
        raise LostError(f"{moment}: still not finished after {len(codes)} commands")
    return f"{moment}, exit codes {codes}"


def tear(run: RunFolder, rng: random.Random) -> str:
    """Cut a random file of the run in half, as a loss of power may; return its name."""
    kept = run.config_file.name, ".lock"
    files = sorted(path for path in run.path.rglob("*") if path.is_file() and path.name not in kept)
    newest = max(run.checkpoints.root.glob("round_*"), default=None)
    files = [path for path in files if newest is None or newest in path.parents or path.parent == run.path]
    if not files:
        return "nothing"
    chosen = rng.choice(files)
    os.truncate(chosen, chosen.stat().st_size // 2)
    return str(chosen.relative_to(run.path))


def digest(run: RunFolder) -> str:
    """Return a digest of what a run left: adapters, and the states of its newest checkpoint."""
    files = [*run.adapters.rglob("*"), run.checkpoints.root / folder_name(LAST_STEP) / STATES]
    sums = {
        str(path.relative_to(run.path)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def campaign(kinds: Sequence[str], faults: int, seed: int, root: Path) -> list[str]:
    """Run the faults one after the other, print a line for each, and return the lines of those that were lost."""
    rng = random.Random(seed)
    folder = root / "undisturbed"
    folder.mkdir(parents=True)
    if Command.start(folder, "in_process", resume=False).end() != 0:
        raise SystemExit((folder / "stderr.txt").read_text())
    expected = digest(RunFolder(folder / "run"))
    lost = []
    for number in range(faults):
        kind, started = kinds[number % len(kinds)], time.monotonic()
        folder = root / f"{number:03d}-{kind}"
        folder.mkdir()
        try:
            text = disturbed_run(kind, folder, rng)
            if digest(RunFolder(folder / "run")) != expected:
                raise LostError(f"{text}: other adapters or states than the undisturbed run")
        except LostError as error:
            lost.append(f"{number:03d} {kind}: {error}")
        verdict = "lost    " if lost and lost[-1].startswith(f"{number:03d} ") else "survived"
        line = lost[-1] if verdict == "lost    " else f"{number:03d} {kind}: {text}"
        print(f"{verdict} {line} ({time.monotonic() - started:.0f} s)", flush=True)
        if verdict == "survived":
            shutil.rmtree(folder)
    return lost


def main() -> None:
    """Run the campaign and print what was survived; the exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description="Kill runs in every way and resume them.")
    parser.add_argument("--faults", type=int, default=50, help="number of disturbed runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default=",".join(STRIKES), help=f"kinds, of {', '.join(STRIKES)}")
    parser.add_argument("--folder", type=Path, help="where runs are kept that were lost; by default a temporary folder")
    arguments = parser.parse_args()
    kinds = arguments.only.split(",")
    if unknown := sorted(set(kinds) - set(STRIKES)):
        parser.error(f"unknown fault {unknown[0]}; known are {', '.join(STRIKES)}")
    if arguments.folder and arguments.folder.exists() and any(arguments.folder.iterdir()):
        parser.error(f"{arguments.folder} is not empty")
    root = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    lost = campaign(kinds, arguments.faults, arguments.seed, root)
    print(f"{arguments.faults - len(lost)} of {arguments.faults} survived" + (f"; see {root}" if lost else ""))
    if not lost:
        shutil.rmtree(root)
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()

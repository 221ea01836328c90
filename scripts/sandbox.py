"""Run a script in a Linux namespace with processes, ports and mounts of its own, all of which end with the script.

`ray up`, `ray down` and `ray stop` end every Ray process that they can see, and Ray's ports are fixed. So a script that
uses them starts itself again inside a namespace, where it is process 1, sees no other process, and has a loopback of
its own.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sylva_ray.storage.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.monotonic()
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
"""The command `ray` of this environment."""

SYLVA = [sys.executable, "-m", "sylva_ray.cli"]
"""The command `sylva-ray`."""

SMALL = [
    *("dataset.max_train=150", "dataset.max_test=60", "partition.num_clients=3", "partition.min_samples=20"),
    *("partition.test_samples=10", "attack.steps=2", "training.device=cpu", "tracking.enabled=false"),
    *("training.precision=float32", "training.attention=fused", "evaluation.precision=float32"),
]
"""Changes of configs/digits.yaml for a run of seconds: three clients, two cohorts.

Precisions and kernels are fixed: runs that measure them may choose differently, and would then differ in their bits.
"""

MARK = "SYLVA_RAY_SANDBOX"
"""Environment variable that is set inside the namespace."""


def missing(programs: Sequence[str] = ()) -> str:
    """Return why `enter` cannot work on this machine, or an empty text."""
    absent = [
        name for name in ("unshare", *programs) if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if absent:
        return f"{', '.join(absent)} is not installed"
    tried = subprocess.run([*_unshare(), "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"this machine allows no namespaces ({tried.stderr.strip()})"


def enter() -> None:
    """Start this script again inside a namespace, as its process 1; inside it, prepare the namespace."""
    if os.environ.get(MARK) != "1":
        environment = os.environ | {MARK: "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
        environment = {name: value for name, value in environment.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        command = [*_unshare(), sys.executable, *sys.argv]
        os.execvpe(command[0], command, environment)
    _raise_loopback()
    Path("/tmp/ray").mkdir(exist_ok=True)
    # Ray notes there which cluster is the current one.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/tmp/ray"], check=True)
    socket.sethostname("localhost")  # without a network, Ray takes a machine's address from its name


def temporary_home() -> Path:
    """Make an empty home folder with a token of its own, so that the user's token is not used."""
    home = Path(tempfile.mkdtemp(prefix="sr", dir="/tmp"))  # Ray's sockets need a short path
    os.environ |= {"HOME": str(home), "RAY_AUTH_MODE": "token"}
    subprocess.run([*RAY, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    return home


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    """Wait for a condition; end the script, naming ``what``, if it is not met in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.2)


def adapters(run_dir: Path) -> dict[str, bytes]:
    """Read the files that a run exported, by their paths."""
    files = sorted(RunFolder(run_dir).adapters.rglob("*"))
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files if path.is_file()}


def result_file(description: str | None) -> Path | None:
    """Parse the one argument of these scripts, ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write what happened here, as JSON")
    out: Path | None = parser.parse_args().out
    return out


def finish(result: Mapping[str, object], out: Path | None, work: Path | None = None) -> None:
    """Print a result, without the name of the temporary folder ``work``, and write it to ``out``."""
    text = json.dumps(result, indent=1) + "\n"
    print(text.replace(str(work), "...") if work else text, end="")
    if out is not None:
        out.write_text(text)


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--pid", "--net", "--uts", "--fork", "--mount-proc", "--kill-child", "--"]


def _raise_loopback() -> None:
    """Do what ``ip link set lo up`` does, without iproute2 (SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        (flags,) = struct.unpack_from("16xh", fcntl.ioctl(probe, 0x8913, struct.pack("16sh14x", b"lo", 0)))
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh14x", b"lo", flags | 1))

"""Ray's autoscaler on the node types of our cluster.yaml, without a cloud: workers come, one is lost in mid-round, all leave.

    sylva-ray run ──► demand ──► autoscaler (real) ──► fake nodes (real raylets on this machine, GPUs in name only)
                                                             └─ one is killed, as a spot machine would be

    python scripts/autoscaling.py [--out result.json]

Ray's own provider for such tests starts the nodes; everything else, the autoscaler included, is what runs on AWS. The adapters
must be those of the same experiment in one process, bit for bit. Needs `unshare`; takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from sandbox import RAY, ROOT, enter, say, temporary_home, wait_until

ADDRESS = "127.0.0.1:6379"
HEAD = "ray.head.default"
"""What the provider of fake nodes calls the head, whatever the file says."""

TOLD = ("step", "waiting", "a worker", "sylva-ray")
"""What the log here repeats of what `sylva-ray run` says; Ray adds a dump of the node that was killed."""

CONFIG = [
    *("dataset.max_train=150", "dataset.max_test=60", "partition.num_clients=3", "partition.min_samples=20"),
    *(
        "partition.test_samples=10",
        "training.rounds=4",
        "attack.steps=2",
        "training.device=cpu",
        "tracking.enabled=false",
    ),
]
"""The digits at smoke scale: three clients, two cohorts, hence two actors."""


def fake_cluster() -> dict[str, Any]:
    """cluster.yaml's node types and limits for Ray's provider of fake nodes."""
    ours = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    head = ours["head_node_type"]
    types = {
        HEAD if name == head else name: {
            "node_config": {},
            "min_workers": kind.get("min_workers", 0),
            "max_workers": kind.get("max_workers", 0),
            "resources": kind["resources"] | {"object_store_memory": 200_000_000},
        }
        for name, kind in ours["available_node_types"].items()
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": ours["max_workers"],
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": ours["upscaling_speed"],
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": ADDRESS,
        },
        "head_node_type": HEAD,
        "available_node_types": types,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }


def raylets() -> dict[str, tuple[str, int]]:
    """``{node id: (node type, process id)}`` of the workers."""
    found: dict[str, tuple[str, int]] = {}
    for process in sorted(psutil.process_iter(), key=lambda process: process.pid):
        try:
            own = process.environ()
            if process.name() == "raylet" and "RAY_NODE_TYPE_NAME" in own:  # a fork of it has a higher process id
                node = own["RAY_OVERRIDE_NODE_ID_FOR_TESTING"]
                found.setdefault(node, (own["RAY_NODE_TYPE_NAME"], process.pid))
        except psutil.Error:
            continue
    return found


class Watch:
    """Says which workers come and go, and remembers it."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[str, int]] = {}
        self.came: Counter[str] = Counter()
        self.most = 0

    def look(self) -> dict[str, tuple[str, int]]:
        """What there is now."""
        now = raylets()
        for node in now.keys() - self.seen.keys():
            self.came[now[node][0]] += 1
            say(f"a worker came:    {now[node][0]}")
        for node in self.seen.keys() - now.keys():
            say(f"a worker is gone: {self.seen[node][0]}")
        self.seen, self.most = now, max(self.most, len(now))
        return now


def run(out: Path, *overrides: str) -> list[str]:
    """The command line of one run."""
    command = [sys.executable, "-m", "sylva_ray.cli", "run", str(ROOT / "configs/digits.yaml"), "--out", str(out)]
    return [*command, *CONFIG, *overrides]


def adapters(run_dir: Path) -> dict[str, bytes]:
    """Everything that a run exported."""
    return {
        str(p.relative_to(run_dir)): p.read_bytes() for p in sorted((run_dir / "adapters").rglob("*")) if p.is_file()
    }


def main() -> None:
    """The scenario, in the order of its log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write what happened here, as JSON")
    out = parser.parse_args().out
    enter()
    work = temporary_home()
    alone, together = work / "alone", work / "together"
    subprocess.run(run(alone, "cluster.pool=in_process", "--quiet"), check=True, stdout=subprocess.DEVNULL)
    say("the reference: one process, nobody lost")

    (work / "fake.yaml").write_text(json.dumps(fake_cluster()))
    start = f"ray start --head --block --port=6379 --num-cpus=0 --num-gpus=0 --include-dashboard=false --temp-dir={work}/ray"
    head = subprocess.Popen(
        [*RAY, *start.split()[1:], f"--autoscaling-config={work}/fake.yaml"],
        env=os.environ
        | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    probe = [*RAY, "status", "--address", ADDRESS]
    wait_until(lambda: subprocess.run(probe, capture_output=True, check=False).returncode == 0, "a head", 180)
    say("the head is up, without a GPU, and nothing else is")

    watch = Watch()
    cluster = (f"cluster.address={ADDRESS}", f"cluster.launcher={ROOT / 'cluster.yaml'}", "cluster.gpus_per_actor=1")
    driver = subprocess.Popen(
        run(together, *cluster, "cluster.connect_timeout_s=90"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.set_blocking(driver.stdout.fileno(), False)
    said: list[str] = []
    lost = None
    while driver.poll() is None:
        for line in driver.stdout:
            said.append(line.rstrip())
            if line.startswith(TOLD):
                say(f"| {line.rstrip()}")
        workers = watch.look()
        if lost is None and (together / "checkpoint/round_0001/manifest.json").exists():
            lost, (kind, process) = next(iter(workers.items()))
            os.kill(process, signal.SIGKILL)
            say(f"killed, in mid-round: a worker of type {kind}")
    said += [line.rstrip() for line in driver.stdout]
    if driver.returncode:
        sys.exit("\n".join(said))
    same = adapters(alone) == adapters(together)
    say(f"{len(adapters(together))} adapter files, {'the same bits' if same else 'OTHER BITS'} as in one process")
    wait_until(lambda: not watch.look(), "without a worker again", 120)
    say("idle workers have left; the head is alone again")
    result = {
        "workers_that_came": dict(watch.came),
        "most_workers_at_once": watch.most,
        "tasks_run_again": sum("its clients run again elsewhere" in line for line in said),
        "waiting_lines": sum(line.startswith("waiting for the first") for line in said),
        "same_adapters": same,
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    head.terminate()
    head.wait()
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()

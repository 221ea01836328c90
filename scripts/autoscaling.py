"""Run Ray's autoscaler on the node types of cluster.yaml, without a cloud: workers come, one is lost, all leave.

    sylva-ray run, then tune ──► demand ──► autoscaler (real) ──► fake nodes (real raylets here, GPUs in name only)
                                                                        └─ one is killed, as a spot machine would be

    python scripts/autoscaling.py [--out result.json]

Ray's own provider for such tests starts the nodes. Everything else, including the autoscaler (version 2), is what `ray
up` starts on AWS. The adapters must equal those of the same experiments in one process, bit for bit. Needs `unshare`;
takes some minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

sys.path.insert(0, str(Path(__file__).parent))
from sandbox import RAY, ROOT, SMALL, SYLVA, adapters, enter, finish, result_file, say, temporary_home, wait_until

from sylva_ray.config.schema import read_yaml
from sylva_ray.core.yaml import to_yaml
from sylva_ray.storage.manifest import MANIFEST, folder_name
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.points import Trial

ADDRESS = "127.0.0.1:6379"
DIGITS = ROOT / "configs/digits.yaml"
HEAD = "ray.head.default"
"""Name of the head in the provider of fake nodes, whatever the file says."""

SHOWN = ("step", "trial", "waiting", "no trial", "a worker", "sylva-ray")
"""Beginnings of the lines of `sylva-ray` that are repeated here; Ray adds a dump of the node that was killed."""

CONFIG = [*SMALL, "training.rounds=4"]
ON_CLUSTER = [
    *(f"cluster.address={ADDRESS}", f"cluster.launcher={ROOT / 'cluster.yaml'}"),
    *("cluster.gpus_per_actor=1", "cluster.connect_timeout_s=90"),
]
RANKS = (4, 8)
"""Ranks of the sweep's two trials; each needs a GPU, and therefore a worker."""


def fake_cluster() -> dict[str, object]:
    """Return the node types and limits of cluster.yaml for Ray's provider of fake nodes."""
    shipped = read_yaml(ROOT / "cluster.yaml")
    head = shipped["head_node_type"]
    types = {
        HEAD if name == head else name: {
            "node_config": {},
            "min_workers": kind.get("min_workers", 0),
            "max_workers": kind.get("max_workers", 0),
            "resources": kind["resources"] | {"object_store_memory": 200_000_000},
        }
        for name, kind in shipped["available_node_types"].items()
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": shipped["max_workers"],
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": shipped["upscaling_speed"],
        "provider": {
            "type": "external",  # for "fake_multinode", the autoscaler reads defaults that Ray's wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": ADDRESS,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
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
    """Find the workers, ``{node id: (node type, process id)}``."""
    found: dict[str, tuple[str, int]] = {}
    for process in sorted(psutil.process_iter(), key=lambda process: process.pid):
        try:
            environment = process.environ()
            if process.name() == "raylet" and environment.get("RAY_NODE_TYPE_NAME", HEAD) != HEAD:
                node = environment["RAY_OVERRIDE_NODE_ID_FOR_TESTING"]
                # a fork of it has a higher process id
                found.setdefault(node, (environment["RAY_NODE_TYPE_NAME"], process.pid))
        except psutil.Error:
            continue
    return found


class Watch:
    """Prints and counts the workers that come and go.

    Attributes:
        seen: the workers when they were last looked at.
        came: how many of each type came.
        most: the most at once.
    """

    def __init__(self) -> None:
        self.seen: dict[str, tuple[str, int]] = {}
        self.came: Counter[str] = Counter()
        self.most = 0

    def look(self) -> dict[str, tuple[str, int]]:
        """Return the present workers."""
        now = raylets()
        for node in now.keys() - self.seen.keys():
            self.came[now[node][0]] += 1
            say(f"a worker came:    {now[node][0]}")
        for node in self.seen.keys() - now.keys():
            say(f"a worker is gone: {self.seen[node][0]}")
        self.seen, self.most = now, max(self.most, len(now))
        return now


def adapters_in_process(out: Path, *overrides: str) -> dict[str, bytes]:
    """Return the adapters of a run in one process."""
    in_process = [*CONFIG, "cluster.pool=in_process", *overrides, "--quiet", "--out", str(out)]
    subprocess.run([*SYLVA, "run", str(DIGITS), *in_process], check=True, stdout=subprocess.DEVNULL)
    files: dict[str, bytes] = adapters(out)
    return files


def start_head(work: Path) -> subprocess.Popen[bytes]:
    """Start a head without a GPU, whose autoscaler may add the workers of `fake_cluster`."""
    (work / "fake.yaml").write_text(json.dumps(fake_cluster()))
    start = "start --head --block --port=6379 --num-cpus=0 --num-gpus=0 --include-dashboard=false"
    settings = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    settings |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_NODE_TYPE_NAME": HEAD}  # as `ray up` sets them
    head = subprocess.Popen(
        [*RAY, *start.split(), f"--temp-dir={work}/ray", f"--autoscaling-config={work}/fake.yaml"],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    probe = [*RAY, "status", "--address", ADDRESS]
    wait_until(lambda: subprocess.run(probe, capture_output=True, check=False).returncode == 0, "a head", 180)
    return head


def play(command: list[str], out: Path, run: Path, watch: Watch) -> list[str]:
    """Run `sylva-ray` to its end, and kill one worker after the first round of ``run``; return its output."""
    driver = subprocess.Popen(
        [*SYLVA, *command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert driver.stdout is not None
    os.set_blocking(driver.stdout.fileno(), False)
    said: list[str] = []
    first_checkpoint = RunFolder(run).checkpoints.root / folder_name(1) / MANIFEST
    lost = False
    while True:
        over = driver.poll() is not None
        for line in driver.stdout:
            said.append(line.rstrip())
            if line.startswith(SHOWN):
                say(f"| {line.rstrip().replace(str(out), '...')}")
        if over:
            break
        workers = watch.look()
        if not lost and first_checkpoint.exists():
            lost, (kind, process) = True, next(iter(workers.values()))
            os.kill(process, signal.SIGKILL)
            say(f"killed, in mid-round: a worker of type {kind}")
    if driver.returncode:
        sys.exit("\n".join(said))
    return said


def main() -> None:
    """Run the scenario."""
    result_at = result_file(__doc__)
    enter()
    work = temporary_home()
    sweep = work / "sweep"
    run_alone = adapters_in_process(work / "alone")
    trials_alone = {rank: adapters_in_process(work / f"alone{rank}", f"lora.rank={rank}") for rank in RANKS}
    say("the references: one process, no worker lost")
    head, watch = start_head(work), Watch()
    say("the head is up, without a GPU and without workers")

    together = work / "together"
    said = play(["run", str(DIGITS), *CONFIG, *ON_CLUSTER], together, together, watch)
    same = adapters(together) == run_alone != {}
    say(f"the run's {len(run_alone)} adapter files: {'the same bits' if same else 'DIFFERENT BITS'} as in one process")
    wait_until(lambda: not watch.look(), "without a worker again", 120)
    say("idle workers have left; the head is alone again")
    result: dict[str, object] = {
        "workers_that_came": dict(watch.came),
        "most_workers_at_once": watch.most,
        "tasks_run_again": sum("its clients run again elsewhere" in line for line in said),
        "same_adapters": same,
    }

    watch = Watch()
    space = {"name": "ranks", "base": str(DIGITS), "parameters": {"lora.rank": {"grid": list(RANKS)}}}
    (work / "space.yaml").write_text(to_yaml(space))
    trials = {rank: SweepFolder(sweep).trial(Trial({"lora.rank": rank}, 0).key).path for rank in RANKS}
    tuned = ["tune", str(work / "space.yaml"), *CONFIG, *ON_CLUSTER, "cluster.pool=ray"]
    said = play(tuned, sweep, trials[RANKS[0]], watch)
    same = all(adapters(trials[rank]) == trials_alone[rank] != {} for rank in RANKS)
    say(f"the sweep's {len(RANKS)} trials: {'the same bits' if same else 'DIFFERENT BITS'} as in one process")
    wait_until(lambda: not watch.look(), "without a worker again", 120)
    say("idle workers have left; the head is alone again")
    result["sweep"] = {
        "workers_that_came": dict(watch.came),
        "most_workers_at_once": watch.most,
        "tasks_run_again": sum("its clients run again elsewhere" in line for line in said),
        "same_adapters": same,
    }
    head.terminate()
    head.wait()
    shutil.rmtree(work, ignore_errors=True)
    finish(result, result_at)


if __name__ == "__main__":
    main()

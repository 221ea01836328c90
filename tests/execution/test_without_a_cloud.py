"""The scripts that stand in for a cloud, each in a namespace of its own, and what must be true of what they saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import ray_up_on_loopback  # noqa: E402
import sandbox  # noqa: E402

pytestmark = pytest.mark.slow


def play(script: str, folder: Path, *programs: str) -> dict[str, Any]:
    """Run a script to its end and return what it saw."""
    why = sandbox.missing(programs)
    if why:
        pytest.skip(why)
    out = folder / "result.json"
    command = [sys.executable, str(ROOT / "scripts" / script), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_gpu_workers_come_with_the_work_and_leave_and_a_lost_one_costs_nothing_but_time(tmp_path: Path) -> None:
    """The node types are those of cluster.yaml; the script has waited until the idle ones were gone."""
    seen = play("autoscaling.py", tmp_path)
    assert seen["workers_that_came"]["small"] >= 2
    assert seen["most_workers_at_once"] >= 2
    assert seen["tasks_run_again"] >= 1
    assert seen["same_adapters"]
    assert seen["sweep"]["workers_that_came"]["small"] >= 2
    assert seen["sweep"]["most_workers_at_once"] == 2
    assert seen["sweep"]["tasks_run_again"] >= 1
    assert seen["sweep"]["same_adapters"]


def test_actors_spread_by_gpu_fraction_and_a_node_gets_one_copy_of_what_they_share(tmp_path: Path) -> None:
    seen = play("several_nodes.py", tmp_path)
    assert (seen["actors"], seen["nodes"], seen["actors_per_gpu"]) == (4, 2, [2, 2])
    for count in seen["bytes_per_node"]:
        assert seen["reckoned_bytes"] <= count < 1.1 * seen["reckoned_bytes"]


def test_ray_up_jobs_and_ray_down_over_ssh(tmp_path: Path) -> None:
    """From an empty home to a resumed run, with cluster.yaml's own commands."""
    if os.geteuid() != 0:
        pytest.skip("an sshd of one's own needs root")
    seen = play("ray_up_on_loopback.py", tmp_path, *ray_up_on_loopback.NEEDS)
    assert seen["mounted"] == [".ray/auth_token", "dist/constraints.txt", "sylva_ray.env"]
    assert "CPUs:" in seen["ray_submit"]
    assert seen["log_steps"] >= 2
    assert "Resume with: sylva-ray run file://" in seen["log_resume"]
    assert "STOPPED" in seen["job"].upper()
    assert not seen["finished_too_early"]
    assert seen["same_adapters"]
    wrong = {name: seen[name] for name in ("wrong_token", "no_token", "unreachable", "too_many_gpus")}
    assert all(answer["exit"] == 2 and answer["lines"] == 1 for answer in wrong.values()), wrong
    assert "refuses our token" in seen["wrong_token"]["says"]
    assert "refuses our token" in seen["no_token"]["says"]
    assert "no Ray cluster answers there" in seen["unreachable"]["says"]
    assert "cluster.gpus_per_actor" in seen["too_many_gpus"]["says"]
    assert seen["refused_after_down"] == 2

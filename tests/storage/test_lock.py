"""One process at a time writes to a folder; a lock ends with its process, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import sylva_ray
from sylva_ray.cli import app
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.storage.lock import LOCK, folder_lock
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.sweeps.folder import SweepFolder
from tests.storage.conftest import ONE_PHASE, contents
from tests.sweeps.toys import space_of

pytestmark = pytest.mark.long

HOLD = """
import sys, time
from pathlib import Path
from sylva_ray.storage.lock import folder_lock
with folder_lock(Path(sys.argv[1]), "--out", int(sys.argv[2]) or None):
    print("locked", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold(folder: Path, driver: int = 0, seconds: float = 60) -> subprocess.Popen[str]:
    """Start a process that holds the lock of a folder; return when it has it."""
    command = [sys.executable, "-c", HOLD, str(folder), str(driver), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_the_second_process_is_told_who_holds_the_folder_and_a_killed_holder_does_not_block(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = hold(folder)
    try:
        started = time.monotonic()
        with pytest.raises(UserError) as caught, folder_lock(folder, "--out"):
            pass
        assert time.monotonic() - started < 1
        host = os.uname().nodename
        said = f"--out = {str(folder)!r}: is being used by process {holder.pid} on {host}; wait until it ends,"
        assert str(caught.value).startswith(said)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert (folder / LOCK).exists(), "the file of a killed process remains and means nothing"
    with folder_lock(folder, "--out"):
        pass
    assert not folder.exists() or not (folder / LOCK).exists()


def test_a_lock_waits_for_a_process_whose_driver_was_killed(tmp_path: Path) -> None:
    """A coordinator ends a moment after its driver; a driver that lives means that the run goes on."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    orphan = hold(tmp_path, driver=dead.pid, seconds=1)
    with folder_lock(tmp_path, "--out"):
        assert orphan.wait(timeout=5) == 0
    followed = hold(tmp_path, driver=os.getpid(), seconds=1)
    with pytest.raises(UserError, match="is being used by process"), folder_lock(tmp_path, "--out"):
        pass
    with folder_lock(tmp_path, "--out", wait_s=10):
        assert followed.wait(timeout=5) == 0


def test_many_processes_never_hold_a_lock_at_once(tmp_path: Path) -> None:
    """They all add to a number in turn, and remove the file of the lock every time."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom sylva_ray.storage.lock import folder_lock\n"
        "root, number = Path(sys.argv[1]), Path(sys.argv[1]) / 'number'\n"
        "for _ in range(40):\n"
        "    with folder_lock(root, '--out', wait_s=30):\n"
        "        number.write_text(str(int(number.read_text()) + 1))\n"
    )
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()}) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "120"


def test_a_lock_leaves_nothing_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no"), folder_lock(tmp_path / "new", "--out"):
        raise UserError("seed", 1, "no")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), folder_lock(tmp_path / "file" / "run", "--out"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="without locks"), folder_lock(tmp_path, "--out"):
        pass


def test_commands_that_write_to_a_run_are_refused_and_those_that_read_are_not(finished: RunFolder) -> None:
    holder = hold(finished.path)
    try:
        for call in (
            lambda: sylva_ray.evaluate(finished.path, ["fgsm"], show="nothing"),
            lambda: sylva_ray.repair(finished.path),
            lambda: sylva_ray.api.report(finished.path),
            lambda: sylva_ray.api.track(finished.path),
        ):
            with pytest.raises(UserError, match=f"is being used by process {holder.pid}"):
                call()
        assert sylva_ray.load_run(finished.path).summary is not None
        assert sylva_ray.compare([finished.path], show="nothing")
    finally:
        holder.kill()
        holder.wait()


def test_a_second_run_in_a_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    """Another seed in a folder that a run has just taken, and a resume beside a run."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(ONE_PHASE))
    holder = hold(tmp_path / "run")
    try:
        result = CliRunner().invoke(app, ["run", str(config), "seed=1", "--out", str(tmp_path / "run")])
    finally:
        holder.kill()
        holder.wait()
    assert result.exit_code == 2
    assert f"is being used by process {holder.pid}" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert CliRunner().invoke(app, ["run", str(config), "--out", str(tmp_path / "run"), "--quiet"]).exit_code == 0
    assert LOCK not in contents(tmp_path / "run")


def test_a_sweep_and_a_pretraining_lock_their_folders(tmp_path: Path) -> None:
    from sylva_ray.pretraining.trainer import pretrain
    from tests.pretraining.test_pretrain import config

    sweep = SweepFolder(tmp_path / "sweep")
    holders = [hold(sweep.root), hold(tmp_path / "backbone")]
    try:
        with pytest.raises(UserError, match="is being used by process"), sweep.locked():
            sweep.claim(space_of(tmp_path), resume=False)
        with pytest.raises(UserError, match="is being used by process"):
            pretrain(config(), tmp_path / "backbone", False, lambda _: None)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def test_a_resolved_config_is_claimed_once(tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim(tiny_config, resume=False)
    with pytest.raises(UserError, match="already holds a run"), folder.locked():
        folder.claim(tiny_config, resume=False)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_a_lock_that_is_no_file_is_named_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"\.lock.*is not a file of ours; remove it"), folder_lock(tmp_path, "--out"):
        pass

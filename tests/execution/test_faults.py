"""Whoever is killed (a client actor, the coordinator, the driver; SIGKILL by process id), the adapters are the same."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.records import StageRecord
from sylva_ray.core.types import ParameterStack
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.preparation.experiment import Prepared, create_worker
from sylva_ray.storage.run_folder import RunFolder
from tests.execution.conftest import Notices, adapter_files
from tests.execution.test_ray_pool import assert_same_bits, states

ray = pytest.importorskip("ray")

from sylva_ray.execution.ray.driver import coordinator_name  # noqa: E402
from sylva_ray.execution.ray.pool import RayPool  # noqa: E402
from sylva_ray.execution.ray.session import NAMESPACE  # noqa: E402
from sylva_ray.execution.run import run_prepared  # noqa: E402

pytestmark = pytest.mark.slow

MakeTask = Callable[..., CohortTask]


@pytest.fixture(scope="module")
def undisturbed(tiny: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapters of the same experiment in one process, with nobody killed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_prepared(tiny, RunFolder(run_dir), False, Observer())
    return adapter_files(run_dir)


def make_pool(prepared: Prepared, notices: Notices) -> RayPool:
    fleet, backbone = ray.put(prepared.fleet), ray.put(prepared.backbone)
    return RayPool(prepared.config, fleet, backbone, 1, notices)


def busy_actor() -> psutil.Process:
    """Wait until a client actor runs a task, which Ray writes into the title of its process."""
    while True:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ray::ClientActor.run" in process.cmdline():
                    return process
        time.sleep(0.01)


@pytest.mark.usefixtures("local_ray")
def test_a_killed_client_actor_is_replaced_and_its_clients_run_again(on_ray: Prepared, train_task: MakeTask) -> None:
    """One actor, killed inside a task: what the new one makes of it is what nobody's death would have changed."""
    tasks = [train_task((0, 1), epochs=20), train_task((2,))]
    notices = Notices()
    pool = make_pool(on_ray, notices)

    threading.Thread(target=lambda: busy_actor().kill(), daemon=True).start()
    try:
        results = pool.run(tasks)
    finally:
        pool.close()
    assert notices.texts == ["a worker was lost during train, step 1, clients 0, 1; its clients run again elsewhere"]
    worker = create_worker(on_ray.config, on_ray.fleet, on_ray.backbone)
    assert_same_bits(states(results), states(InProcessPool(worker).run(tasks)))


@pytest.mark.usefixtures("local_ray")
def test_an_actor_that_hangs_is_replaced(on_ray: Prepared, train_task: MakeTask) -> None:
    """Stopped inside a task, it answers nothing, and Ray takes it for alive."""
    tasks = [train_task((0, 1), epochs=20)]
    notices = Notices()
    cluster = on_ray.config.cluster.model_copy(update={"hang_timeout_s": 6.0})
    patient = dataclasses.replace(on_ray, config=on_ray.config.model_copy(update={"cluster": cluster}))
    pool = make_pool(patient, notices)
    stopped: list[psutil.Process] = []

    def stop_when_busy() -> None:
        stopped.append(busy_actor())
        stopped[0].suspend()

    threading.Thread(target=stop_when_busy, daemon=True).start()
    try:
        results = pool.run(tasks)
    finally:
        pool.close()
    assert notices.texts == ["a worker was lost during train, step 1, clients 0, 1; its clients run again elsewhere"]
    _, alive = psutil.wait_procs(stopped, timeout=30)
    assert alive == []
    worker = create_worker(on_ray.config, on_ray.fleet, on_ray.backbone)
    assert_same_bits(states(results), states(InProcessPool(worker).run(tasks)))


@pytest.mark.usefixtures("local_ray")
def test_a_task_beyond_its_deadline_ends_the_run(on_ray: Prepared, train_task: MakeTask) -> None:
    """It is tried again once, and then the error names the setting."""
    cluster = on_ray.config.cluster.model_copy(update={"task_deadline_s": 0.5})
    hasty = dataclasses.replace(on_ray, config=on_ray.config.model_copy(update={"cluster": cluster}))
    pool = make_pool(hasty, Notices())
    try:
        with pytest.raises(RunError, match=r"2 time\(s\).*longer than 0.5 s \(cluster.task_deadline_s\)"):
            pool.run([train_task((0, 1), epochs=500)])
    finally:
        pool.close()


class Poison:
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


class LethalTask(CohortTask):
    """Never gets to execute: its states end the process that unpickles them."""

    def execute(self, worker: Any, params: ParameterStack) -> Any:
        raise AssertionError(worker, params)


@pytest.mark.usefixtures("local_ray")
def test_a_task_that_always_kills_its_actor_ends_the_run(on_ray: Prepared) -> None:
    """max_task_retries = 1: a second chance, and then an error that names the clients."""
    notices = Notices()
    pool = make_pool(on_ray, notices)
    poisoned = LethalTask(3, (1, 2), {"weight": Poison()})  # type: ignore[dict-item]
    try:
        with pytest.raises(RunError, match=r"work, step 3, clients 1, 2: the client actor was lost 2 time"):
            pool.run([poisoned])
    finally:
        pool.close()
    assert notices.texts == ["a worker was lost during work, step 3, clients 1, 2; its clients run again elsewhere"]


@pytest.mark.usefixtures("local_ray")
def test_a_killed_coordinator_goes_on_to_the_same_adapters(
    on_ray: Prepared, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    class KillInTheSecondStep(Notices):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[int] = []

        def on_record(self, record: StageRecord) -> None:
            self.steps.append(record.step)
            if len(self.steps) == 1:
                coordinator = ray.get_actor(coordinator_name(RunFolder(run_dir)), NAMESPACE)
                os.kill(ray.get(coordinator.pid.remote()), signal.SIGKILL)

    observer = KillInTheSecondStep()
    summary = run_prepared(on_ray, RunFolder(run_dir), False, observer)
    assert observer.texts == ["the coordinator failed and was restarted; it continues from the newest checkpoint"]
    assert adapter_files(run_dir) == undisturbed
    assert summary.rounds == on_ray.config.training.rounds


@pytest.mark.usefixtures("local_ray")
def test_errors_of_the_coordinator_arrive_as_themselves(on_ray: Prepared, tmp_path: Path) -> None:
    """A run that is not there: one UserError. A failing task inside the coordinator inside Ray: one plain RunError."""
    with pytest.raises(UserError, match="holds no run"):
        run_prepared(on_ray, RunFolder(tmp_path / "none"), True, Observer())
    assert not (tmp_path / "none").exists()
    first, *others = on_ray.fleet.clients
    beyond = dataclasses.replace(first, guard=np.array([10**9]))  # only who takes client 0's images will notice
    broken = dataclasses.replace(on_ray, fleet=dataclasses.replace(on_ray.fleet, clients=(beyond, *others)))
    with pytest.raises(RunError, match=r"^train, step 0, clients 0, .*: IndexError: ") as caught:
        run_prepared(broken, RunFolder(tmp_path / "run"), False, Observer())
    assert type(caught.value) is RunError


def test_a_killed_driver_leaves_no_process_and_a_run_that_resumes(
    on_ray: Prepared, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    config, run_dir = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(on_ray.config.to_yaml())
    command = [sys.executable, "-m", "sylva_ray.cli", "run", str(config), "--out", str(run_dir)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _wait_until((run_dir / "checkpoint" / "round_0001" / "manifest.json").exists, driver)
        # Ray's two agents look after their parent once a minute; everything else is to go at once
        family = [
            p for p in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in " ".join(p.cmdline())
        ]
    finally:
        driver.kill()
        driver.wait()
    assert not (run_dir / "adapters").exists(), "the driver was to die before the end"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert adapter_files(run_dir) == undisturbed


@pytest.mark.parametrize("service", ["raylet", "gcs_server"])
def test_the_loss_of_a_service_of_ray_ends_in_one_line(
    service: str, on_ray: Prepared, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Ray ends the driver at once, without an exception: another process says how to go on."""
    config, run_dir = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(on_ray.config.to_yaml())
    command = [sys.executable, "-m", "sylva_ray.cli", "run", str(config), "--out", str(run_dir)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_until((run_dir / "checkpoint" / "round_0001" / "manifest.json").exists, driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    next(process for process in family if process.name() == service).kill()
    _, errors = driver.communicate(timeout=120)
    if driver.returncode == 0:  # a short run may end before Ray gives the GCS up
        assert service == "gcs_server"
    else:
        assert errors.strip().splitlines()[-1].endswith(f"Resume with: sylva-ray run {run_dir} --resume")
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert adapter_files(run_dir) == undisturbed


def test_a_stopped_driver_ends_in_order_and_says_how_to_resume(on_ray: Prepared, tmp_path: Path) -> None:
    """SIGTERM is what `ray job stop` and schedulers send; Ray's own handler would abort the process."""
    config, run_dir = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(on_ray.config.to_yaml())
    command = [sys.executable, "-m", "sylva_ray.cli", "run", str(config), "--out", str(run_dir)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_until((run_dir / "checkpoint" / "round_0000" / "manifest.json").exists, driver)
    driver.terminate()
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 143
    last = errors.strip().splitlines()[-1]
    assert last == f"sylva-ray: stopped. The finished stages are kept. Resume with: sylva-ray run {run_dir} --resume"


def test_a_stopped_evaluation_goes_on_to_what_one_process_finds(tiny: Prepared, tmp_path: Path) -> None:
    run_dirs = {pool: tmp_path / pool for pool in ("ray", "in_process")}
    run_prepared(tiny, RunFolder(run_dirs["ray"]), False, Observer())
    shutil.copytree(run_dirs["ray"], run_dirs["in_process"])

    def evaluate(pool: str) -> subprocess.Popen[str]:
        options = ["--suite", "quick", "--images", "4", f"cluster.pool={pool}", "cluster.num_actors=1"]
        command = [sys.executable, "-m", "sylva_ray.cli", "evaluate", str(run_dirs[pool]), *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    driver = evaluate("ray")
    _wait_until(lambda: len(list(RunFolder(run_dirs["ray"]).measurements.glob("*.safetensors"))) >= 2, driver)
    driver.terminate()
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 143
    said = "sylva-ray: stopped. What was measured is kept; run the same command again to continue"
    assert errors.strip().splitlines()[-1] == said
    found = {}
    for pool, run_dir in run_dirs.items():
        driver = evaluate(pool)
        _, errors = driver.communicate(timeout=400)
        assert driver.returncode == 0, errors
        found[pool] = json.loads(RunFolder(run_dir).evaluation_file.read_text())
        for row in found[pool]["attacks"].values():
            del row["seconds"], row["images_per_second"]
    assert found["ray"] == found["in_process"]


def _wait_until(condition: Callable[[], bool], driver: subprocess.Popen[str], timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.05)

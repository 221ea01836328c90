"""Sweeps on a real Ray Tune: trials inside their reservation, pruned, retried, resumed, compared in a real MLflow."""

from __future__ import annotations

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
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sylva_ray.core.errors import UserError
from sylva_ray.sweeps.events import AttemptEvent, SweepEvent, TrialProgress, Waiting
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.points import planned_trials, point_id
from sylva_ray.sweeps.results import Sweep
from sylva_ray.sweeps.space import load_space
from tests.conftest import TINY
from tests.execution.conftest import adapter_files
from tests.sweeps.toys import SMALL, ignore, run_sweep, space_of

ray = pytest.importorskip("ray")
optuna = pytest.importorskip("optuna")

from sylva_ray.provisioning.launcher_file import load_promised  # noqa: E402
from sylva_ray.sweeps.optuna_search import PointSearch  # noqa: E402
from sylva_ray.sweeps.ray_tune import _waiting, asha, check_trials_fit, watching  # noqa: E402
from sylva_ray.sweeps.trial import trial_bundles, trials_that_fit  # noqa: E402
from tests.sweeps.test_optuna_search import play  # noqa: E402

HOME = "node:10.0.0.1"
ROOT = Path(__file__).parents[2]


def adapters_of(sweep: Sweep, root: Path) -> dict[str, dict[str, bytes]]:
    """Return the adapter files of every trial."""
    return {trial.key: adapter_files(root / "trials" / trial.key) for trial in sweep.trials}


# -- what a trial reserves ---------------------------------------------------------------------------------------------


def test_a_trial_reserves_its_coordinator_and_its_actors(tmp_path: Path) -> None:
    """In process, one bundle is both."""
    cluster = {"pool": "ray", "num_actors": 2, "cpus_per_actor": 0.5, "gpus_per_actor": 0.25}
    space = space_of(tmp_path, {**SMALL, "cluster": cluster, "training": {"cohort_size": 1}})
    bundles = trial_bundles(space.config({}, 0), HOME)
    assert bundles == [{HOME: 0.001}, *([{"CPU": 0.5, "GPU": 0.25}] * 2)]
    assert trial_bundles(space_of(tmp_path).config({}, 0), HOME) == [{HOME: 0.001, "CPU": 1.0, "GPU": 0.0}]


def test_every_client_its_actor_reserves_as_many_as_the_point_has(tmp_path: Path) -> None:
    """The points differ in their clients."""
    cluster = {"pool": "ray", "num_actors": "per_client"}
    space = space_of(tmp_path, {**SMALL, "cluster": cluster}, parameters={"partition.num_clients": {"grid": [2, 3]}})
    sizes = [len(trial_bundles(space.config(trial.values, 0), HOME)) for trial in planned_trials(space)]
    assert sizes == [1 + 2, 1 + 3]


@pytest.mark.parametrize(
    ("nodes", "fit"),
    [
        ([{"CPU": 2.0, HOME: 1.0}], 1),
        ([{"CPU": 1.0, HOME: 1.0}], 0),
        ([{HOME: 1.0}, {"CPU": 5.0}], 2),
        ([{"CPU": 3.0, HOME: 1.0}, {"CPU": 3.0}], 3),
        ([{"CPU": 64.0}], 0),  # only the driver's node may hold the coordinator
    ],
)
def test_how_many_trials_fit(nodes: list[dict[str, float]], fit: int) -> None:
    """Of one coordinator and two actors with a CPU each."""
    assert trials_that_fit([{HOME: 0.001}, {"CPU": 1.0}, {"CPU": 1.0}], nodes) == fit


HEAD = {"CPU": 8.0, HOME: 1.0}


@pytest.mark.parametrize(
    ("cluster", "at_once", "slots"),
    [
        ({"gpus_per_actor": 1}, "auto", 4 * 1 + 1 * 4),  # four small workers of one GPU and a large one of four
        ({"gpus_per_actor": 0.5, "num_actors": 2}, "auto", 8),
        ({"gpus_per_actor": 4}, "auto", 1),
        ({"gpus_per_actor": 1}, 3, 3),
        ({"cpus_per_actor": 4}, "auto", (8 + 4 * 4 + 48) // 4),
    ],
)
def test_trials_may_ask_for_what_an_autoscaler_brings(
    cluster: dict[str, Any], at_once: Any, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the head of our cluster.yaml is up."""
    monkeypatch.setattr("sylva_ray.sweeps.ray_tune.node_resources", lambda: [HEAD])
    experiment = {**SMALL, "cluster": {"pool": "ray", **cluster}, "training": {"cohort_size": 1}}
    space = space_of(tmp_path, experiment, trials={"at_once": at_once})
    assert check_trials_fit(space, HOME, load_promised(ROOT / "cluster.yaml")) == slots


@pytest.mark.parametrize(
    ("share", "actors", "fit"),
    [(0.4, 4, 1), (0.4, 5, 0), (0.6, 2, 1), (0.6, 3, 0), (0.5, 2, 2), (0.1, 20, 1), (0.1, 21, 0), (2, 1, 1), (2, 2, 0)],
)
def test_a_share_of_a_gpu_lies_on_one_gpu(share: float, actors: int, fit: int) -> None:
    """Two GPUs: what Ray places, and what it would wait for for ever."""
    bundles = [{HOME: 0.001}, *([{"CPU": 0.1, "GPU": share}] * actors)]
    assert trials_that_fit(bundles, [{"CPU": 8.0, "GPU": 2.0, HOME: 1.0}]) == fit


@pytest.mark.parametrize(("gpus", "says"), [({}, "(nodes: 2)"), ({"GPU": 1.0}, "(nodes: 2, GPUs: 2)")])
def test_who_waits_without_gpus_reads_nothing_of_gpus(
    gpus: dict[str, float], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sylva_ray.sweeps.ray_tune.node_resources", lambda: [{"CPU": 2.0, **gpus}] * 2)
    assert _waiting().text.endswith(says)


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        ({"pool": "ray", "gpus_per_actor": 4, "num_actors": 2}, "one trial needs 2 x .1 CPUs, 4 GPUs., .* 8 GPUs"),
        ({"pool": "in_process", "gpus_per_actor": 1}, "on this node, which has 8 CPUs and 0 GPUs; cluster.pool=ray"),
    ],
)
def test_a_trial_that_no_autoscaler_can_place_is_refused(
    cluster: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what a trial needs and what there may be."""
    monkeypatch.setattr("sylva_ray.sweeps.ray_tune.node_resources", lambda: [HEAD])
    space = space_of(tmp_path, {**SMALL, "cluster": cluster, "training": {"cohort_size": 1}})
    with pytest.raises(UserError, match=says):
        check_trials_fit(space, HOME, load_promised(ROOT / "cluster.yaml"))


def test_a_sweep_without_a_running_trial_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first trial, and after the process of one was killed."""
    for name, value in (("node_resources", lambda: [HEAD]), ("POLL_INTERVAL_S", 0.01), ("STATUS_INTERVAL_S", 0.05)):
        monkeypatch.setattr(f"sylva_ray.sweeps.ray_tune.{name}", value)
    space, folder = space_of(tmp_path / "s"), SweepFolder(tmp_path / "sweep")
    folder.claim(space, resume=False)
    events: list[SweepEvent] = []
    waits = threading.Event()

    def listen(event: SweepEvent) -> None:
        events.append(event)
        waits.set() if isinstance(event, Waiting) else None

    with watching(folder, space, listen):
        assert waits.wait(10)
    assert isinstance(events[-1], Waiting)
    assert events[-1].text.endswith("(nodes: 1)")
    with watching(folder, space, listen):
        folder.add_event("k-s0", AttemptEvent(began=1.0, process=os.getpid()))
        time.sleep(0.3)
    assert isinstance(events[-1], TrialProgress), "no waiting while a trial runs"
    gone = subprocess.Popen(["true"])
    gone.wait()
    waits.clear()
    with watching(folder, space, listen):  # a process that was killed did not write that it ended
        folder.add_event("k-s0", AttemptEvent(began=2.0, process=gone.pid))
        assert waits.wait(10)


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        ({"pool": "in_process", "gpus_per_actor": 8}, "cluster.gpus_per_actor = 8"),
        (
            {"pool": "ray", "num_actors": 3, "cpus_per_actor": 1},
            "one trial needs 3 x .1 CPUs., and the whole cluster",
        ),
    ],
)
@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_fits_nowhere_is_refused_and_nothing_written(
    cluster: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """On a real cluster of two CPUs."""
    space = space_of(tmp_path / "s", {**SMALL, "cluster": cluster, "training": {**SMALL["training"], "cohort_size": 1}})
    with pytest.raises(UserError, match=says):
        run_sweep(space, tmp_path / "sweep", resume=False, on_event=ignore)
    assert not (tmp_path / "sweep").exists()


# -- pruning, without trials -------------------------------------------------------------------------------------------


NO_ONE: Any = None
"""In place of Tune's controller, which the scheduler does not ask."""


def toy_trials(scheduler: Any, number: int) -> list[Any]:
    """Add trials that are nothing but a name."""
    trials = [SimpleNamespace(trial_id=str(index)) for index in range(number)]
    for trial in trials:
        scheduler.on_trial_add(NO_ONE, trial)
    return trials


def test_asha_keeps_the_best_third_at_every_rung_and_lets_them_finish(tmp_path: Path) -> None:
    """The rungs are after rounds 1 and 3: who has done all 9 rounds has nothing left to save."""
    experiment = {**SMALL, "training": {**SMALL["training"], "rounds": 9}}
    scheduler = asha(space_of(tmp_path, experiment, scheduler={"kind": "asha", "reduction_factor": 3}))

    trials = toy_trials(scheduler, 9)
    stopped: dict[int, int] = {}
    for step in range(0, 12):  # personalisation comes after the last round
        for number in reversed(range(9)):  # the best reports first
            result = {"step": step, "rounds": min(step, 9), "robust_accuracy": number / 10}
            if number not in stopped and scheduler.on_trial_result(NO_ONE, trials[number], result) == "STOP":
                stopped[number] = step
    assert set(stopped.values()) <= {1, 3}
    assert 8 not in stopped
    assert sum(step == 1 for step in stopped.values()) >= 5


def test_asha_stops_nobody_who_has_done_all_rounds(tmp_path: Path) -> None:
    """With 9 rounds there is no rung after the ninth, where those that end worst would be stopped in vain."""
    experiment = {**SMALL, "training": {**SMALL["training"], "rounds": 9}}
    scheduler = asha(space_of(tmp_path, experiment, scheduler={"kind": "asha", "reduction_factor": 3}))

    trials = toy_trials(scheduler, 9)
    answers = set()
    for rounds in range(1, 10):
        for number in range(9):  # up to the last rung, each is better than those before it; later, worse
            accuracy = number / 10 if rounds <= 3 else 1 - number / 10
            result = {"rounds": rounds, "robust_accuracy": accuracy}
            answers.add(scheduler.on_trial_result(NO_ONE, trials[number], result))
    assert answers == {"CONTINUE"}


def test_asha_counts_rounds_and_not_stages(tmp_path: Path) -> None:
    """A method with two stages before round 1, or some after the last, is at the rungs when others are."""
    experiment = {**SMALL, "training": {**SMALL["training"], "rounds": 2}}
    scheduler = asha(space_of(tmp_path, experiment, scheduler={"kind": "asha", "reduction_factor": 2}))

    ahead, behind = toy_trials(scheduler, 2)
    told = [
        scheduler.on_trial_result(NO_ONE, trial, {"step": step, "rounds": rounds, "robust_accuracy": accuracy})
        for trial, step, rounds, accuracy in [
            (ahead, 0, 0, 0.9),
            (ahead, 1, 0, 0.1),
            (ahead, 2, 1, 0.8),
            (behind, 1, 1, 0.5),
        ]
    ]
    assert told == ["CONTINUE", "CONTINUE", "CONTINUE", "STOP"]


# -- whole sweeps ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_more_trials_than_the_cluster_holds_each_with_its_own_actors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four trials of two half-CPU actors on two CPUs: two at once, all of them finish, nothing is oversubscribed.

    They have one copy of the data and of the backbone in the object store.
    """
    kept: list[str] = []
    kill = ray.kill

    def kill_and_look(actor: Any) -> None:
        if hasattr(actor, "find"):
            kept.extend(key.split("/")[0] for key in ray.get(actor.keys.remote()))
        kill(actor)

    monkeypatch.setattr(ray, "kill", kill_and_look)
    cluster = {"pool": "ray", "num_actors": 2, "cpus_per_actor": 0.5}
    experiment = {**SMALL, "cluster": cluster, "training": {**SMALL["training"], "cohort_size": 2}}
    space = space_of(tmp_path / "s", experiment, parameters={"lora.rank": {"grid": [1, 2, 3, 4]}})
    sweep = run_sweep(space, tmp_path / "sweep", resume=False, on_event=ignore)
    assert [trial.state for trial in sweep.trials] == ["finished"] * 4
    assert sweep.workers == 4, "actors at once: half a CPU each on two"
    assert kept == ["data", "backbone"]
    alone = run_sweep(
        space_of(tmp_path / "a", SMALL | {"training": experiment["training"]}, parameters={"lora.rank": {"grid": [3]}}),
        tmp_path / "alone",
        resume=False,
        on_event=ignore,
    )
    (key,) = adapters_of(alone, tmp_path / "alone")
    assert adapters_of(sweep, tmp_path / "sweep")[key] == adapters_of(alone, tmp_path / "alone")[key]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_trial_whose_process_dies_goes_on_from_its_last_round(tmp_path: Path) -> None:
    """The process is killed after the first round; the adapters are those of an undisturbed trial."""
    killed: list[int] = []
    process: list[int] = []
    steps: list[int] = []

    def kill_after_the_first_round(event: SweepEvent) -> None:
        line = event.event if isinstance(event, TrialProgress) else AttemptEvent(began=0.0)
        if line.process is not None:
            process.append(line.process)
        if line.step is not None:
            steps.append(line.step)
            if line.step >= 1 and not killed:
                killed.append(process[-1])
                os.kill(process[-1], signal.SIGKILL)

    longer = {**SMALL, "training": {**SMALL["training"], "rounds": 40}}
    space = space_of(tmp_path / "s", longer, parameters={"lora.rank": {"grid": [2]}})
    sweep = run_sweep(space, tmp_path / "sweep", resume=False, on_event=kill_after_the_first_round)
    assert killed, "the trial was to die"
    assert [trial.state for trial in sweep.trials] == ["finished"]
    assert len(sweep.trials[0].spans) == 2
    assert steps == list(range(len(steps))), "a step was done twice"
    undisturbed = run_sweep(space, tmp_path / "undisturbed", resume=False, on_event=ignore)
    assert adapters_of(sweep, tmp_path / "sweep") == adapters_of(undisturbed, tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_cannot_run_is_named_and_not_tried_again(tmp_path: Path) -> None:
    """A trial may still be refused when it starts. Here, its folder is taken."""
    space = space_of(tmp_path / "s")
    taken, other = planned_trials(space)
    folder = tmp_path / "sweep"
    run_sweep(space_of(tmp_path / "o", parameters={"lora.rank": {"grid": [2]}}), folder, resume=False, on_event=ignore)
    (folder / "trials" / taken.key).mkdir()
    (folder / "trials" / taken.key / "thesis.txt").write_text("precious")
    for name in ("tune", "attempts"):
        shutil.rmtree(folder / name)
    (folder / "space.yaml").write_text(space.to_yaml())
    sweep = run_sweep(space, folder, resume=True, on_event=ignore)
    assert [(trial.key, trial.state) for trial in sweep.trials] == [(taken.key, "refused"), (other.key, "finished")]
    assert "is not empty and holds no run" in sweep.failed[0].error
    assert len(sweep.failed[0].spans) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_point_of_optunas_that_is_no_experiment_is_refused_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corners and an inner point are checked before; here that is a corner, and no suggested fraction is a client."""
    monkeypatch.setattr("sylva_ray.sweeps.points.GOLDEN", 0.0)
    space = space_of(
        tmp_path / "s",
        parameters={"byzantine.fraction": {"uniform": [0.0, 0.34]}},
        search={"kind": "optuna", "num_points": 3},
    )
    sweep = run_sweep(space, tmp_path / "sweep", resume=False, on_event=ignore)
    assert [trial.state for trial in sweep.trials] == ["refused"] * 3
    assert all("byzantine.fraction" in trial.error and "less than 1" in trial.error for trial in sweep.failed)
    assert [len(trial.spans) for trial in sweep.trials] == [1] * 3, "it was tried again"
    assert "was refused: byzantine.fraction" in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_asha_prunes_real_trials_and_mlflow_shows_them_under_the_sweep(tmp_path: Path) -> None:
    """By bytes, the smallest adapter is the best after any round: the others go after their first round."""
    mlflow = pytest.importorskip("mlflow")
    experiment = {**SMALL, "tracking": {"enabled": True}, "training": {**SMALL["training"], "rounds": 3}}
    space = space_of(
        tmp_path / "s",
        experiment,
        parameters={"lora.rank": {"grid": [1, 4, 8]}},
        objectives=[{"metric": "total_bytes", "mode": "min"}],
        scheduler={"kind": "asha", "reduction_factor": 2},
        trials={"at_once": 1},
    )
    root = tmp_path / "runs" / "sweep"
    root.parent.mkdir()
    sweep = run_sweep(space, root, resume=False, on_event=ignore)
    found = {trial.values["lora.rank"]: (trial.state, trial.rounds) for trial in sweep.trials}
    assert found == {1: ("finished", 3), 4: ("pruned", 1), 8: ("pruned", 1)}
    assert sweep.chosen[0].values == {"lora.rank": 1}

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root.parent / 'mlflow.db'}")
    known = client.get_experiment_by_name("tiny")
    runs = client.search_runs([known.experiment_id])
    (parent,) = (run for run in runs if "sylva.kind" in run.data.tags)
    children = {run.data.tags["sylva.point"]: run for run in runs if run is not parent}
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"].count("\n| ") >= 3
    assert len(children) == 3
    for trial in sweep.trials:
        run = children[trial.point]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["sylva.seed"] == "0"
        assert int(run.data.params["lora.rank"]) == trial.values["lora.rank"]
        assert run.info.status == ("FINISHED" if trial.state == "finished" else "KILLED")
        assert not [name for name in run.data.metrics if name.startswith("client_")]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"space.yaml", "sweep.json", "report.html", "best.yaml"}

    from sylva_ray.observers.sources import load_runs

    summaries, left_out = load_runs(["tiny"], f"sqlite:///{root.parent / 'mlflow.db'}")
    assert len(summaries) == 1
    assert len(left_out) == 2, "pruned trials are named, the sweep itself is no row"
    assert len(load_runs([str(root)])[0]) == 1, "a sweep's folder is a folder of runs"


TUNE = [sys.executable, "-m", "sylva_ray.cli", "tune"]


def kill_driver(space: Path, root: Path, is_time: Callable[[], bool]) -> None:
    """Start a sweep in a process of its own, and kill it when it is time; returns when its trials have ended, too."""
    driver = subprocess.Popen([*TUNE, str(space), "--out", str(root)], stderr=subprocess.PIPE, text=True)
    workers: list[psutil.Process] = []
    try:
        end = time.monotonic() + 400
        while not is_time():
            assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
            assert time.monotonic() < end, "the sweep did not get that far"
            time.sleep(0.05)
        family = psutil.Process(driver.pid).children(recursive=True)
        workers = [
            process for process in family if process.name().startswith("ray::") and "Agent" not in process.name()
        ]
    finally:
        driver.kill()
        driver.wait()
    psutil.wait_procs(workers, timeout=30)
    assert not (root / "sweep.json").exists()


def resume_driver(root: Path) -> None:
    """Resume a sweep in a process of its own."""
    resumed = subprocess.run([*TUNE, str(root), "--resume"], capture_output=True, text=True, timeout=500, check=False)
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.slow
def test_a_killed_driver_is_resumed_to_the_same_results(tmp_path: Path) -> None:
    """Killed in the second trial and resumed, every trial has the adapters of a run on its own."""
    experiment = {**TINY, "cluster": {"pool": "in_process"}}
    space = space_of(tmp_path / "s", experiment, parameters={"lora.rank": {"grid": [1, 2, 3]}}, trials={"at_once": 1})
    root = tmp_path / "sweep"
    keys = [trial.key for trial in planned_trials(space)]
    second = root / "trials" / keys[1] / "checkpoint" / "round_0001" / "manifest.json"
    kill_driver(tmp_path / "s" / "space.yaml", root, second.exists)
    summary = (root / "trials" / keys[0] / "summary.json").read_bytes()
    resume_driver(root)
    assert (root / "trials" / keys[0] / "summary.json").read_bytes() == summary, "a finished trial ran again"
    found = json.loads((root / "sweep.json").read_text())
    assert {trial["key"]: trial["state"] for trial in found["trials"]} == dict.fromkeys(keys, "finished")
    from sylva_ray.execution.run import run_prepared
    from sylva_ray.federation.observer import Observer
    from sylva_ray.preparation.experiment import prepare
    from sylva_ray.storage.run_folder import RunFolder

    for trial in planned_trials(space):
        alone = tmp_path / "alone" / trial.key
        run_prepared(prepare(space.config(trial.values, trial.seed)), RunFolder(alone), False, Observer())
        assert adapter_files(root / "trials" / trial.key) == adapter_files(alone)
    best = load_space(root / "space.yaml")
    assert best == space
    assert (root / "best.yaml").exists()


@pytest.mark.slow
def test_a_killed_optuna_search_is_resumed_to_the_same_points(tmp_path: Path) -> None:
    """The points are those that an uninterrupted search suggests for the results that the trials had."""
    space = space_of(
        tmp_path / "s",
        SMALL | {"training": SMALL["training"] | {"rounds": 1}},
        parameters={"training.lr": {"uniform": [0.001, 0.01]}, "lora.rank": {"choice": [1, 2]}},
        search={"kind": "optuna", "num_points": 3, "seed": 7},
        trials={"at_once": 1},
    )
    root = tmp_path / "sweep"
    state = root / "tune"

    def has_saved_a_result() -> bool:
        texts = [path.read_text() for path in state.glob("searcher-state-*.json")]
        return any('"results":{"0":[' in text for text in texts)

    kill_driver(tmp_path / "s" / "space.yaml", root, has_saved_a_result)
    resume_driver(root)
    assert not list(state.glob("searcher-state-*.pkl"))
    trials = json.loads((root / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["finished"] * 3
    results = {trial["point"]: trial["metrics"] for trial in trials}
    suggested = play(PointSearch(space), lambda trial: results[point_id(trial["values"])])
    assert {point_id(trial["values"]) for trial in suggested} == results.keys()


def test_points_have_the_same_name_in_every_sweep() -> None:
    """A name is a hash of the values."""
    assert point_id({"lora.rank": 2}) == point_id({"lora.rank": 2})
    assert point_id({"lora.rank": 2}) != point_id({"lora.rank": 4})


def test_the_folder_reads_what_it_wrote(tmp_path: Path) -> None:
    """The space, and the history of a trial, whose keys are listed in docs/sweeps.md."""
    folder, space = SweepFolder(tmp_path / "sweep"), space_of(tmp_path / "s")
    folder.claim(space, resume=False)
    assert folder.load() == space
    events = [AttemptEvent(began=1.0), AttemptEvent(began=1.0, ended=2.0, outcome="died", error="")]
    for event in events:
        folder.add_event("k-s0", event)
    assert folder.history("k-s0") == events
    assert folder.started_trials() == ["k-s0"]
    lines = (tmp_path / "sweep" / "attempts" / "k-s0.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"began": 1.0, "ended": 2.0, "outcome": "died", "error": ""}

"""Sweeps on a real Ray Tune: trials inside their own reservation, pruned, retried, resumed; compared in a real MLflow store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from sylva_ray.core.errors import UserError
from sylva_ray.sweeps.events import AttemptEvent, SweepEvent, TrialProgress, Waiting
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.points import planned_trials, point_id
from sylva_ray.sweeps.results import Sweep
from sylva_ray.sweeps.space import Space, load_space
from tests.conftest import TINY
from tests.execution.conftest import adapter_files

ray = pytest.importorskip("ray")
optuna = pytest.importorskip("optuna")

from sylva_ray.provisioning.launcher_file import load_promised  # noqa: E402
from sylva_ray.sweeps.optuna_search import PointSearch  # noqa: E402
from sylva_ray.sweeps.ray_tune import asha, check_trials_fit, max_rounds, run_sweep, watching  # noqa: E402
from sylva_ray.sweeps.trial import trial_bundles, trials_that_fit  # noqa: E402

SMALL: dict[str, Any] = {
    **TINY,
    "algorithm": {"name": "fedit_at"},
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 1}], "every": 1, "checks": False},
}
"""`TINY` without a phase 2, measured after every round."""

HOME = "node:10.0.0.1"
ROOT = Path(__file__).parents[2]


def space_of(folder: Path, experiment: Mapping[str, Any] = SMALL, **keys: Any) -> Space:
    raw = {"name": "tiny", "experiment": dict(experiment), "parameters": {"lora.rank": {"grid": [1, 2]}}} | keys
    folder.mkdir(exist_ok=True)
    (folder / "space.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return load_space(folder / "space.yaml")


def ignore(event: object) -> None:
    """Take an event of a sweep or of a run."""


def adapters_of(sweep: Sweep, root: Path) -> dict[str, dict[str, bytes]]:
    return {trial.key: adapter_files(root / "trials" / trial.key) for trial in sweep.trials}


# -- what a trial reserves ------------------------------------------------------------------------------------------------


def test_a_trial_reserves_its_coordinator_and_its_actors(tmp_path: Path) -> None:
    cluster = {"pool": "ray", "num_actors": 2, "cpus_per_actor": 0.5, "gpus_per_actor": 0.25}
    space = space_of(tmp_path, {**SMALL, "cluster": cluster, "training": {"cohort_size": 1}})
    bundles = trial_bundles(space.config({}, 0), HOME)
    assert bundles == [{HOME: 0.001}, *([{"CPU": 0.5, "GPU": 0.25}] * 2)]
    assert trial_bundles(space_of(tmp_path).config({}, 0), HOME) == [{HOME: 0.001, "CPU": 1.0, "GPU": 0.0}]


def test_every_client_its_actor_reserves_as_many_as_the_point_has(tmp_path: Path) -> None:
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
        ([{"CPU": 64.0}], 0),  # the coordinator's place is taken by nobody else
    ],
)
def test_how_many_trials_fit(nodes: list[dict[str, float]], fit: int) -> None:
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
    monkeypatch.setattr("sylva_ray.sweeps.ray_tune.node_resources", lambda: [HEAD])
    space = space_of(tmp_path, {**SMALL, "cluster": cluster, "training": {"cohort_size": 1}})
    with pytest.raises(UserError, match=says):
        check_trials_fit(space, HOME, load_promised(ROOT / "cluster.yaml"))


def test_a_sweep_without_a_running_trial_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert events[-1].text.endswith("(nodes: 1, GPUs: 0)")
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
            "one trial needs 3 x .1 CPUs, 0 GPUs., and the whole cluster",
        ),
    ],
)
@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_fits_nowhere_is_refused_and_nothing_written(
    cluster: dict[str, Any], says: str, tmp_path: Path
) -> None:
    space = space_of(tmp_path / "s", {**SMALL, "cluster": cluster, "training": {**SMALL["training"], "cohort_size": 1}})
    with pytest.raises(UserError, match=says):
        run_sweep(space, tmp_path / "sweep", resume=False, on_event=ignore)
    assert not (tmp_path / "sweep").exists()


# -- search and pruning, without trials -----------------------------------------------------------------------------------

OBJECTIVES = [{"metric": "benign_accuracy"}, {"metric": "robust_accuracy"}]


def play(search: PointSearch, outcome: Any) -> list[dict[str, Any]]:
    """Answer every suggestion at once; returns them."""
    given: list[dict[str, Any]] = []
    while True:
        trial_id = f"t{len(given)}"
        suggested = search.suggest(trial_id)
        if suggested == "FINISHED":
            return given
        given.append(suggested["trial"])
        search.on_trial_complete(trial_id, {"finished": True} | outcome(suggested["trial"]))


def test_optuna_hears_of_a_point_once_all_its_seeds_are_done(tmp_path: Path) -> None:
    parameters = {"training.lr": {"loguniform": [0.001, 0.1]}, "lora.rank": {"choice": [1, 2, 4]}}
    space = space_of(tmp_path, parameters=parameters, seeds=[0, 1], search={"kind": "optuna", "num_points": 6})
    search = PointSearch(space)
    given = play(search, lambda trial: {"robust_accuracy": trial["seed"] / 2})
    assert [trial["seed"] for trial in given] == [0, 1] * 6
    assert all(a["values"] == b["values"] for a, b in zip(given[::2], given[1::2], strict=True))
    assert [trial.value for trial in search.study.trials] == [0.25] * 6


def test_optuna_finds_the_front_of_two_objectives(tmp_path: Path) -> None:
    """Benign falls and robust rises with epsilon; a bad learning rate costs both: the front is at good learning rates."""
    parameters = {"attack.epsilon": {"uniform": [0.0, 0.1]}, "training.lr": {"uniform": [0.0, 1.0]}}
    space = space_of(
        tmp_path, parameters=parameters, objectives=OBJECTIVES, search={"kind": "optuna", "num_points": 60, "seed": 1}
    )
    search = PointSearch(space)

    def outcome(trial: dict[str, Any]) -> dict[str, float]:
        epsilon, loss = trial["values"]["attack.epsilon"], (trial["values"]["training.lr"] - 0.3) ** 2
        return {"benign_accuracy": 1 - 5 * epsilon - loss, "robust_accuracy": 5 * epsilon - loss}

    given = play(search, outcome)
    told = [tuple(outcome(trial).values()) for trial in given]
    front = {a for a in told if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in told)}
    assert {tuple(trial.values) for trial in search.study.best_trials} == front
    late = [abs(trial["values"]["training.lr"] - 0.3) for trial in given[30:]]
    early = [abs(trial["values"]["training.lr"] - 0.3) for trial in given[:10]]
    assert sum(late) / len(late) < sum(early) / len(early), "it learned nothing"


def test_optuna_does_not_run_a_point_twice_and_stops_when_there_is_no_other(tmp_path: Path) -> None:
    space = space_of(tmp_path, parameters={"lora.rank": {"choice": [1, 2]}}, search={"kind": "optuna", "num_points": 9})
    given = play(PointSearch(space), lambda trial: {"robust_accuracy": trial["values"]["lora.rank"] / 2})
    assert sorted(trial["values"]["lora.rank"] for trial in given) == [1, 2]


MIXED = {"training.lr": {"uniform": [0.0, 1.0]}, "lora.rank": {"choice": [1, 2, 4]}}


@pytest.mark.parametrize("objectives", [OBJECTIVES[:1], OBJECTIVES])
@pytest.mark.parametrize("num_before", [3, 24, 25, 31])
def test_a_resumed_search_suggests_what_the_uninterrupted_one_does(
    num_before: int, objectives: list[dict[str, str]], tmp_path: Path
) -> None:
    """Among the first random points, after them, and between the two seeds of a point; two trials run at once."""
    search = {"kind": "optuna", "num_points": 20, "seed": 5}
    space = space_of(tmp_path, parameters=MIXED, objectives=objectives, seeds=[0, 1], search=search)

    def outcome(trial: dict[str, Any]) -> dict[str, Any]:
        loss, gain = (trial["values"]["training.lr"] - 0.3) ** 2, trial["values"]["lora.rank"] / 8
        return {"finished": trial["values"]["lora.rank"] < 4, "benign_accuracy": 1 - loss, "robust_accuracy": gain}

    def answers(search: PointSearch, running: dict[str, dict[str, Any]], limit: int) -> list[dict[str, Any]]:
        given: list[dict[str, Any]] = []
        while len(given) < limit and (suggested := search.suggest(f"t{len(given)}-{limit}")) != "FINISHED":
            given.append(suggested["trial"])
            running[f"t{len(given) - 1}-{limit}"] = suggested["trial"]
            if len(running) == 2:
                oldest = next(iter(running))
                search.on_trial_complete(oldest, outcome(running.pop(oldest)))
        return given

    whole = answers(PointSearch(space), {}, 99)
    first, second = PointSearch(space), PointSearch(space)
    running: dict[str, dict[str, Any]] = {}
    begun = answers(first, running, num_before)
    first.save(str(tmp_path / "state"))
    first.suggest("later")  # the study goes on; what is saved does not change
    second.restore(str(tmp_path / "state"))
    assert begun + answers(second, running, 99) == whole
    assert len(whole) == 40


def test_the_state_of_a_search_is_json(tmp_path: Path) -> None:
    """Also with values that are lists or mappings."""
    methods = [{"name": "sylva"}, {"name": "lorica"}]
    space = space_of(
        tmp_path, parameters={"algorithm": {"choice": methods}}, search={"kind": "optuna", "num_points": 2}
    )
    search = PointSearch(space)
    first = search.suggest("a")["trial"]
    search.save(str(tmp_path / "state"))
    assert json.loads((tmp_path / "state").read_text())["point_of"] == {"a": point_id(first["values"])}
    resumed = PointSearch(space)
    resumed.restore(str(tmp_path / "state"))
    resumed.on_trial_complete("a", {"finished": True, "robust_accuracy": 0.5})
    assert [trial.value for trial in resumed.study.trials] == [0.5]
    assert resumed.suggest("b")["trial"]["values"] != first["values"]


def test_a_search_that_an_older_version_saved_is_refused(tmp_path: Path) -> None:
    """It is a pickle, which is not read."""
    space = space_of(tmp_path / "s", parameters=MIXED, search={"kind": "optuna", "num_points": 2})
    folder = SweepFolder(tmp_path / "sweep")
    folder.claim(space, resume=False)
    folder.tune.mkdir()
    (folder.tune / "searcher-state-2026-01-01_00-00-00.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match="an older version saved as a pickle") as caught:
        folder.check(space, resume=True)
    assert len(str(caught.value).splitlines()) == 1
    (folder.tune / "searcher-state-2026-01-02_00-00-00.json").write_text("{}")
    folder.check(space, resume=True)


def test_asha_counts_on_the_longest_of_the_trials(tmp_path: Path) -> None:
    rounds = {"training.rounds": {"grid": [9, 6]}}
    space = space_of(tmp_path, parameters=rounds, scheduler={"kind": "asha", "reduction_factor": 3})
    assert max_rounds(space) == 9


def test_asha_keeps_the_best_third_at_every_rung_and_lets_them_finish(tmp_path: Path) -> None:
    experiment = {**SMALL, "training": {**SMALL["training"], "rounds": 9}}
    scheduler = asha(space_of(tmp_path, experiment, scheduler={"kind": "asha", "reduction_factor": 3}))

    class Toy:
        def __init__(self, number: int) -> None:
            self.trial_id = str(number)

    controller: Any = None
    trials: list[Any] = [Toy(number) for number in range(9)]
    for trial in trials:
        scheduler.on_trial_add(controller, trial)
    stopped: dict[int, int] = {}
    for step in range(0, 12):  # personalisation comes after the last round
        for number in reversed(range(9)):  # the best reports first
            result = {"step": step, "robust_accuracy": number / 10}
            if number not in stopped and scheduler.on_trial_result(controller, trials[number], result) == "STOP":
                stopped[number] = step
    assert set(stopped.values()) <= {1, 3, 9}
    assert 8 not in stopped
    assert sum(step == 1 for step in stopped.values()) >= 5


# -- whole sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_more_trials_than_the_cluster_holds_each_with_its_own_actors(tmp_path: Path) -> None:
    """Four trials of two half-CPU actors on two CPUs: two at once, all of them finish, nothing is oversubscribed."""
    cluster = {"pool": "ray", "num_actors": 2, "cpus_per_actor": 0.5}
    experiment = {**SMALL, "cluster": cluster, "training": {**SMALL["training"], "cohort_size": 2}}
    space = space_of(tmp_path / "s", experiment, parameters={"lora.rank": {"grid": [1, 2, 3, 4]}})
    sweep = run_sweep(space, tmp_path / "sweep", resume=False, on_event=ignore)
    assert [trial.state for trial in sweep.trials] == ["finished"] * 4
    assert sweep.workers == 4, "actors at once: half a CPU each on two"
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
    """Corners are proved before; in between, a random point may still be no experiment. Here its folder is taken."""
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
    """Corners and an inner point are checked before; here the inner point is a corner, and no suggested rank is whole."""
    monkeypatch.setattr("sylva_ray.sweeps.points.GOLDEN", 0.0)
    space = space_of(
        tmp_path / "s",
        parameters={"lora.rank": {"uniform": [1, 2]}},
        search={"kind": "optuna", "num_points": 3},
    )
    sweep = run_sweep(space, tmp_path / "sweep", resume=False, on_event=ignore)
    assert [trial.state for trial in sweep.trials] == ["refused"] * 3
    assert all("lora.rank" in trial.error and "integer" in trial.error for trial in sweep.failed)
    assert [len(trial.spans) for trial in sweep.trials] == [1] * 3, "it was tried again"
    assert "was refused: lora.rank" in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_asha_prunes_real_trials_and_mlflow_shows_them_under_the_sweep(tmp_path: Path) -> None:
    """By bytes, the smallest adapter is the best after any round: it comes first, and the others go after their first round."""
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

    from sylva_ray.observers.sources import load

    summaries, left_out = load(["tiny"], f"sqlite:///{root.parent / 'mlflow.db'}")
    assert len(summaries) == 1
    assert len(left_out) == 2, "pruned trials are named, the sweep itself is no row"
    assert len(load([str(root)])[0]) == 1, "a sweep's folder is a folder of runs"


@pytest.mark.slow
def test_a_killed_driver_is_resumed_to_the_same_results(tmp_path: Path) -> None:
    """SIGKILL in the second trial; --resume finishes, and every adapter is that of a run on its own."""
    experiment = {**TINY, "cluster": {"pool": "in_process"}}
    space = space_of(tmp_path / "s", experiment, parameters={"lora.rank": {"grid": [1, 2, 3]}}, trials={"at_once": 1})
    root = tmp_path / "sweep"
    command = [sys.executable, "-m", "sylva_ray.cli", "tune"]
    driver = subprocess.Popen(
        [*command, str(tmp_path / "s" / "space.yaml"), "--out", str(root)], stderr=subprocess.PIPE, text=True
    )
    keys = [trial.key for trial in planned_trials(space)]
    try:
        end = time.monotonic() + 400
        while not (root / "trials" / keys[1] / "checkpoint" / "round_0001" / "manifest.json").exists():
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
    summary = (root / "trials" / keys[0] / "summary.json").read_bytes()
    resumed = subprocess.run(
        [*command, str(root), "--resume"], capture_output=True, text=True, timeout=500, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert (root / "trials" / keys[0] / "summary.json").read_bytes() == summary, "a finished trial ran again"
    found = json.loads((root / "sweep.json").read_text())
    assert {trial["key"]: trial["state"] for trial in found["trials"]} == dict.fromkeys(keys, "finished")
    from sylva_ray.execution.ray.driver import run_prepared
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


def test_points_have_the_same_name_in_every_sweep() -> None:
    assert point_id({"lora.rank": 2}) == point_id({"lora.rank": 2})
    assert point_id({"lora.rank": 2}) != point_id({"lora.rank": 4})


def test_the_folder_reads_what_it_wrote(tmp_path: Path) -> None:
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

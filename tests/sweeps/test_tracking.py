"""A sweep in a real MLflow store, without training: a parent, its trials under it, a comparison that reads them."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sylva_ray.cli import app
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.errors import UserError
from sylva_ray.sweeps.events import AttemptEvent
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.output import write_results
from sylva_ray.sweeps.points import Trial, planned_trials
from sylva_ray.sweeps.results import Sweep, collect_results
from sylva_ray.sweeps.space import Space, load_space
from sylva_ray.sweeps.tracking import SweepTracking, TrialTracking, trial_config
from tests.conftest import TINY
from tests.reports.synthetic_run import make_run

pytestmark = pytest.mark.long

mlflow = pytest.importorskip("mlflow")


def space_of(folder: Path, ranks: tuple[int, ...] = (2, 4), **tracking: Any) -> Space:
    """Write and load a space of one or two ranks, two seeds each."""
    evaluation = {**TINY["evaluation"], "every": 2}
    experiment = {**TINY, "evaluation": evaluation, "tracking": {"flush_timeout_s": 5, **tracking}}
    raw = {
        "name": "toy",
        "experiment": experiment,
        "parameters": {
            "lora.rank": {"grid": list(ranks)},
            "attack.epsilon": {"grid": ["4/255", "8/255"][: len(ranks)]},
        },
        "seeds": [0, 1],
    }
    folder.mkdir(exist_ok=True)
    (folder / "space.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return load_space(folder / "space.yaml")


def played(folder: SweepFolder, space: Space, tracking: SweepTracking, pruned: Trial | None = None) -> Sweep:
    """Write synthetic runs in place of trained ones; ``pruned`` ends early."""
    trials = planned_trials(space)
    for trial in trials:
        make_run(folder.trial(trial.key).path, trial_config(space, trial, tracking.trials), finished=trial != pruned)
    if pruned is not None:
        folder.add_event(pruned.key, AttemptEvent(began=1.0, ended=2.0, outcome="pruned"))
    sweep = collect_results(folder, space, trials, {})
    write_results(folder, sweep)
    return sweep


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs with the default store beside them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return tmp_path / "runs"


def test_trials_stand_under_the_sweep_and_seeds_share_their_point(runs: Path) -> None:
    """One trial is pruned; `compare` reads the others."""
    space, folder = space_of(runs / "s"), SweepFolder(runs / "sweep")
    folder.claim(space, resume=False)
    tracking = SweepTracking(folder, space)
    tracking.open()
    pruned = planned_trials(space)[-1]
    sweep = played(folder, space, tracking, pruned)
    tracking.close(sweep)
    assert tracking.problems == []

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    (parent,) = (run for run in found if run.data.tags.get("sylva.kind") == "sweep")
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(found) == 1 + len(children) == 9
    points: dict[str, set[str]] = {}
    for run in children:
        points.setdefault(run.data.tags["sylva.point"], set()).add(run.data.tags["sylva.seed"])
        assert run.data.tags["sylva.sweep"] == "sweep", "the folder's name: two sweeps of a space are two"
        assert not [name for name in run.data.metrics if name.startswith("client_")]
        assert not {f.path for f in client.list_artifacts(run.info.run_id)} & {"adapters", "figures"}
    assert list(points.values()) == [{"0", "1"}] * 4
    names = {run.info.run_name for run in children}
    assert "rank=2, epsilon=4/255, seed 0" in names
    assert len(names) == 8
    statuses = sorted(run.info.status for run in children)
    assert statuses == ["FINISHED"] * 7 + ["KILLED"]
    assert parent.data.metrics["trials/finished"] == 7
    assert parent.data.metrics["trials/pruned"] == 1
    assert parent.data.metrics["best/robust_accuracy"] == pytest.approx(sweep.points[0].metrics["robust_accuracy"].mean)
    assert sweep.points[0].label in parent.data.tags["mlflow.note.content"]
    assert "sweep.json" in {file.path for file in client.list_artifacts(parent.info.run_id)}

    result = CliRunner().invoke(app, ["compare", "toy", "--out", "toy.html", "--out", "toy.csv"])
    out = result.stdout
    assert result.exit_code == 0
    assert "has no summary.json and is left out" in out, "the pruned trial is named"
    assert "sweep sweep" not in out, "the sweep itself is no row"
    assert (runs.parent / "toy.csv").read_text().count("final,mean") == 4

    from sylva_ray.observers.sources import load_runs

    assert len(load_runs(["toy/sweep"])[0]) == 7
    with pytest.raises(UserError, match=r"'toy/another': .* has no run with a summary.json"):
        load_runs(["toy/another"])


def test_a_resumed_sweep_goes_on_in_the_same_run(runs: Path) -> None:
    """Also after the run was closed."""
    space, folder = space_of(runs / "s", ranks=(2,)), SweepFolder(runs / "sweep")
    folder.claim(space, resume=False)
    first, again = SweepTracking(folder, space), SweepTracking(folder, space)
    first.open()
    again.open()
    assert first.trials == again.trials
    again.close(played(folder, space, again))
    again.open()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    assert client.get_run(str(again.trials.parent_run_id)).info.status == "RUNNING"


def children_of(store: Path, parent: str | None) -> list[Any]:
    """Return the trials under a parent run."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{store}")
    found = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    return [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent]


def test_a_sweep_that_goes_on_in_another_store_has_all_its_trials_there(runs: Path, empty_store: Path) -> None:
    space, folder = space_of(runs / "s", ranks=(2,)), SweepFolder(runs / "sweep")
    folder.claim(space, resume=False)
    first = SweepTracking(folder, space)
    first.open()
    sweep = played(folder, space, first)
    first.close(sweep)
    other = shutil.copy(empty_store, runs / "other.db")
    moved = SweepTracking(folder, space_of(runs / "s2", ranks=(2,), uri=f"sqlite:///{other}"))
    moved.open()
    moved.close(sweep)
    assert moved.problems == []
    assert len(children_of(Path(other), moved.trials.parent_run_id)) == 2
    assert len(children_of(runs / "mlflow.db", first.trials.parent_run_id)) == 2, "the first store stays as it is"


def test_a_sweep_that_lost_its_own_run_puts_its_trials_under_another(runs: Path) -> None:
    space, folder = space_of(runs / "s", ranks=(2,)), SweepFolder(runs / "sweep")
    folder.claim(space, resume=False)
    first = SweepTracking(folder, space)
    first.open()
    sweep = played(folder, space, first)
    first.close(sweep)
    folder.parent_run.unlink()
    (folder.trial(sweep.trials[0].key).tracking_file).write_text("")
    again = SweepTracking(folder, space)
    again.open()
    again.close(sweep)
    assert again.problems == []
    assert again.trials.parent_run_id != first.trials.parent_run_id
    assert len(children_of(runs / "mlflow.db", again.trials.parent_run_id)) == 2


def test_a_dead_server_costs_a_warning(runs: Path) -> None:
    """The warning does not show the credentials."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = f"http://ada:s3cret@127.0.0.1:{server.getsockname()[1]}"
    space, folder = space_of(runs / "s", uri=dead), SweepFolder(runs / "sweep")
    folder.claim(space, resume=False)
    tracking = SweepTracking(folder, space)
    tracking.open()
    (problem,) = tracking.problems
    assert "did not receive the sweep's own run" in problem
    assert "s3cret" not in problem
    assert tracking.trials.parent_run_id is None
    assert "s3cret" not in str(tracking.trials)


def test_without_tracking_nothing_is_asked_of_mlflow(runs: Path) -> None:
    """The store has no experiment."""
    space, folder = space_of(runs / "s", enabled=False), SweepFolder(runs / "sweep")
    folder.claim(space, resume=False)
    tracking = SweepTracking(folder, space)
    tracking.open()
    tracking.close(played(folder, space, tracking))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    assert client.get_experiment_by_name("toy") is None


def test_every_trial_computes_as_the_sweep_chose_where_its_space_leaves_it_open(tmp_path: Path) -> None:
    """A value in the space has precedence."""
    space = space_of(tmp_path / "space")
    left_open = {"training": {"rounds": 1, "precision": "auto", "attention": "auto"}, "evaluation": {"attacks": []}}
    space = space.model_copy(update={"experiment": {**space.experiment, **left_open}})
    kernels = AttentionKernels(float32="fused", bfloat16="plain")
    chosen = space.config({}, 0)
    chosen = chosen.model_copy(
        update={
            "training": chosen.training.model_copy(
                update={"precision": "bfloat16", "attention": kernels, "cohort_size": 7}
            ),
            "evaluation": chosen.evaluation.model_copy(update={"precision": "bfloat16"}),
        }
    )
    for trial in planned_trials(space):
        config = trial_config(space, trial, TrialTracking("toy", {}), chosen)
        assert (config.training.precision, config.training.attention) == ("bfloat16", kernels)
        assert config.evaluation.precision == "bfloat16"
        assert config.training.cohort_size != 7, "that depends on the trial's own clients"
    pinned = space.model_copy(update={"experiment": {**space.experiment, "training": {"precision": "float32"}}})
    assert (
        trial_config(pinned, planned_trials(pinned)[0], TrialTracking("toy", {}), chosen).training.precision
        == "float32"
    )

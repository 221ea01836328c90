"""Tracking with MLflow: everything arrives once, and an unreachable server neither delays a run nor loses data."""

from __future__ import annotations

import json
import runpy
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sylva_ray
from sylva_ray import testing
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.tracking import TrackingSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.records import StageRecord
from sylva_ray.execution.run import run_prepared
from sylva_ray.federation.observer import Observer
from sylva_ray.observers.metrics import record_metrics
from sylva_ray.observers.mlflow.tracker import MlflowTracker, experiment_files, send_run, tracking_uri
from sylva_ray.preparation.experiment import prepare
from sylva_ray.reports.pages.run import write_report
from sylva_ray.storage.jsonl import read_records, rewrite_records
from sylva_ray.storage.run_folder import RunFolder
from tests.reports.synthetic_run import make_config, make_run

pytestmark = pytest.mark.long

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for runs, with the default store in it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Yield the address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead_server() -> str:
    """Return an address without a server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def open_client(folder: Path) -> Any:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def only_run(folder: Path) -> Any:
    client = open_client(folder)
    experiment = client.get_experiment_by_name("sylva_ray")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def artifacts(folder: Path, run_id: str, path: str = "") -> set[str]:
    return {file.path for file in open_client(folder).list_artifacts(run_id, path)}


def histories(folder: Path, run_id: str, keys: list[str]) -> dict[str, list[int]]:
    """Return the steps at which each metric was logged."""
    client = open_client(folder)
    return {key: [m.step for m in client.get_metric_history(run_id, key)] for key in keys}


def test_everything_arrives_in_the_default_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # MLflow's own default would put artifacts into the current directory
    run_dir = folder / "my-run"
    config = make_run(run_dir)
    write_report(RunFolder(run_dir))
    records = read_records(run_dir / "rounds.jsonl")
    follower = MlflowTracker(RunFolder(run_dir), config)
    follower.on_resume([])
    assert follower.on_end("FINISHED") == []

    run = only_run(folder)
    experiment = open_client(folder).get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "my-run"
    assert run.data.params == config.flat()
    assert {
        "algorithm": "sylva",
        "dataset": "digits",
        "sylva_ray_version": sylva_ray.__version__,
    }.items() <= run.data.tags.items()

    expected = [r["step"] for r in records if r["evaluation"]]
    keys = ["benign_accuracy/mean", "robust_accuracy/pgd20-eps8/p10", "client_003/benign_accuracy"]
    assert histories(folder, run.info.run_id, keys) == dict.fromkeys(keys, expected)
    every_step = [r["step"] for r in records]
    assert histories(folder, run.info.run_id, ["upload_bytes"]) == {"upload_bytes": every_step}
    history = open_client(folder).get_metric_history(run.info.run_id, "client_003/loss")
    assert [m.value for m in history] == [r["metrics"]["loss"]["3"] for r in records if r["metrics"]]
    summary = RunFolder(run_dir).load_summary()
    assert summary is not None
    assert run.data.metrics["final/robust_accuracy/pgd20-eps8/p10"] == pytest.approx(
        summary.final.robust_accuracy["pgd20-eps8"].p10
    )
    assert run.data.metrics["communication/total_bytes"] == summary.communication.total_bytes
    assert run.data.metrics["seconds/train"] == records[-1]["seconds"]["train"]

    files = {"config.yaml", "rounds.jsonl", "summary.json", "report.html", "clients.json", "figures", "model"}
    assert artifacts(folder, run.info.run_id) == files
    assert len(artifacts(folder, run.info.run_id, "figures")) == 6
    exported = "model/artifacts/adapters/client_005"
    assert artifacts(folder, run.info.run_id, exported) == {f"{exported}/adapter_config.json"}
    assert (folder / "mlartifacts").is_dir()
    assert not any(elsewhere.iterdir())


def test_a_real_run_arrives_whole(folder: Path, tiny_config: ExperimentConfig) -> None:
    tracking = tiny_config.tracking.model_copy(update={"enabled": True})
    prepared = prepare(tiny_config.model_copy(update={"tracking": tracking}))
    summary = run_prepared(prepared, RunFolder(folder / "run"), False, Observer())
    assert not [warning for warning in summary.warnings if warning.startswith("MLflow")]
    run = only_run(folder)
    assert run.info.status == "FINISHED"
    final = summary.final.benign_accuracy.mean
    assert run.data.metrics["final/benign_accuracy/mean"] == pytest.approx(final)
    expected = {"config.yaml", "rounds.jsonl", "summary.json", "report.html", "clients.json"}
    assert artifacts(folder, run.info.run_id) == expected, "nothing of single clients but a table"
    assert not any(name.startswith("client_") for name in run.data.metrics)
    table = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/clients.json")
    column = table["columns"].index("final/benign_accuracy")
    expected_column = pytest.approx(summary.final.benign_accuracy.per_client)
    assert [row[column] for row in table["data"]] == expected_column
    assert f"Benign accuracy {100 * final:.1f} %" in run.data.tags["mlflow.note.content"]
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "digits"
    assert len(given.dataset.digest) == 36

    before = (run.info.end_time, run.data.tags)
    run_prepared(prepared, RunFolder(folder / "run"), True, Observer())
    again = only_run(folder)
    assert (again.info.end_time, again.data.tags) == before, "a finished run that is resumed stays as it is"


@pytest.mark.slow
def test_the_clients_are_one_model_with_a_signature(folder: Path) -> None:
    tracking = {"uri": f"sqlite:///{folder / 'mlflow.db'}", "detail": "clients"}
    config = testing.TINY | {"algorithm": {"name": "per_lora"}, "tracking": tracking}
    sylva_ray.run(config, out=folder / "run", show="nothing")
    mlflow.set_tracking_uri(tracking["uri"])
    model = mlflow.pyfunc.load_model(f"{only_run(folder).info.artifact_uri}/model")
    images = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    answers = [model.predict(images, params={"client": client}) for client in (0, 2)]
    exported = runpy.run_path(str(folder / "run" / "adapters" / "load.py"))
    for client, found in zip((0, 2), answers, strict=True):
        with torch.no_grad():
            expected = exported["load"](f"client_{client:03d}")(exported["preprocess"](torch.from_numpy(images)))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert model.metadata.signature.outputs.inputs[0].shape == (-1, 10)
    with pytest.raises(mlflow.MlflowException, match="shape"):
        model.predict(images[:, :1])


def test_a_resumed_run_continues_in_the_same_mlflow_run_without_duplicates(folder: Path) -> None:
    run_dir = folder / "run"
    config = make_run(run_dir)
    records = read_records(run_dir / "rounds.jsonl")
    (run_dir / "summary.json").rename(folder / "kept")
    rewrite_records(run_dir / "rounds.jsonl", records[:5])
    assert MlflowTracker(RunFolder(run_dir), config).on_end("FAILED") == []
    assert only_run(folder).info.status == "FAILED"

    more_actors = config.cluster.model_copy(update={"num_actors": 3})  # may change on resume; MLflow's params may not
    (folder / "kept").rename(run_dir / "summary.json")
    rewrite_records(run_dir / "rounds.jsonl", records)
    resumed = MlflowTracker(RunFolder(run_dir), config.model_copy(update={"cluster": more_actors}))
    again = RunFolder(run_dir).load_records()
    resumed.on_resume(again[:5])
    for record in again[5:]:
        resumed.on_record(record)
    assert resumed.on_end("FINISHED") == []
    run = only_run(folder)
    assert run.info.status == "FINISHED"
    assert histories(folder, run.info.run_id, ["upload_bytes"])["upload_bytes"] == list(range(len(records)))


def test_stages_that_are_done_again_make_another_run_that_replaces_the_first(folder: Path) -> None:
    """They have other values and other times, so that the store would show both under one step."""
    run_dir = folder / "run"
    config = make_run(run_dir)
    records = read_records(run_dir / "rounds.jsonl")
    assert send_run(RunFolder(run_dir), config) == []
    first = only_run(folder)
    again = [{**record, "seconds": {**record["seconds"], "wall": 77.0}} for record in records[3:]]
    resumed = MlflowTracker(RunFolder(run_dir), config)
    resumed.on_resume(RunFolder(run_dir).load_records()[:3])
    rewrite_records(run_dir / "rounds.jsonl", [*records[:3], *again])
    assert resumed.on_end("FINISHED") == []
    client = open_client(folder)
    experiment = client.get_experiment_by_name("sylva_ray")
    (second,) = (run for run in client.search_runs([experiment.experiment_id]) if run.info.run_id != first.info.run_id)
    assert client.get_run(first.info.run_id).data.tags["sylva_ray.replaced_by"] == second.info.run_id
    assert histories(folder, second.info.run_id, ["upload_bytes"])["upload_bytes"] == list(range(len(records)))
    files = experiment_files("sylva_ray", f"sqlite:///{folder / 'mlflow.db'}", ["summary.json"])
    assert files is not None
    assert list(files) == [second.info.run_id], "a comparison has one of them"


def test_a_mark_that_did_not_arrive_is_sent_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a comparison would count the run twice."""
    run_dir = folder / "run"
    config = make_run(run_dir)
    assert send_run(RunFolder(run_dir), config) == []
    first = only_run(folder)
    tracker = MlflowTracker(RunFolder(run_dir), config)
    tracker._delivery.rewind(3)
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise mlflow.MlflowException("timed out")

        patch.setattr("sylva_ray.observers.mlflow.delivery.MAX_END_ATTEMPTS", 1)
        patch.setattr("sylva_ray.observers.mlflow.tracker._mark_replaced", fail)
        (warning,) = send_run(RunFolder(run_dir), config)
        assert "timed out" in warning
    assert send_run(RunFolder(run_dir), config) == []
    assert "sylva_ray.replaced_by" in open_client(folder).get_run(first.info.run_id).data.tags
    files = experiment_files("sylva_ray", f"sqlite:///{folder / 'mlflow.db'}", ["summary.json"])
    assert files is not None
    assert len(files) == 1
    open_client(folder).delete_run(first.info.run_id)
    MlflowTracker(RunFolder(run_dir), config)._delivery.rewind(3)
    assert send_run(RunFolder(run_dir), config) == [], "and one that somebody has deleted is no reason to fail"


@pytest.mark.parametrize("name", ["a%20b", "a?b"])
def test_a_folder_whose_address_would_be_another_one_is_refused(name: str, tmp_path: Path) -> None:
    section = TrackingSection()
    with pytest.raises(UserError, match=r"tracking.uri.*cannot contain % or \?"):
        tracking_uri(section, tmp_path / name / "run")
    given = section.model_copy(update={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    assert tracking_uri(given, tmp_path / name / "run") == given.uri


def test_sending_again_after_losing_the_count_duplicates_nothing(folder: Path) -> None:
    """After a crash between sending and saving the count, the same values are sent twice."""
    run_dir = folder / "run"
    config = make_run(run_dir)
    assert send_run(RunFolder(run_dir), config) == []
    before = only_run(folder)
    state = json.loads((run_dir / "tracking.json").read_text())
    assert state["finished"]
    assert state["records_sent"] == len(read_records(run_dir / "rounds.jsonl"))
    (run_dir / "tracking.json").write_text(json.dumps(state | {"records_sent": 0, "run_id": None}))
    assert send_run(RunFolder(run_dir), config) == []
    after = only_run(folder)
    assert after.info.run_id == before.info.run_id
    keys = ["upload_bytes", "loss/mean", "final/benign_accuracy/mean"]
    steps = histories(folder, after.info.run_id, keys)
    assert all(len(set(values)) == len(values) for values in steps.values())


def test_an_unreachable_server_is_named_and_a_later_store_receives_all(folder: Path, dead_server: str) -> None:
    run_dir = folder / "run"
    config = make_run(run_dir, make_config(uri=dead_server.replace("//", "//ada:s3cret@")))
    follower = MlflowTracker(RunFolder(run_dir), config)
    follower.on_resume([])
    (warning,) = follower.on_end("FINISHED")
    total = len(read_records(run_dir / "rounds.jsonl"))
    assert f"did not receive {total} of {total} records" in warning
    for missing in ("the end of the run", "summary.json", "figures", "model", f"sylva-ray track {run_dir}"):
        assert missing in warning
    assert "refused" in warning
    assert "s3cret" not in warning

    good = make_config()  # without a uri: the default store
    assert send_run(RunFolder(run_dir), good) == []
    run = only_run(folder)
    assert run.info.status == "FINISHED"
    assert histories(folder, run.info.run_id, ["upload_bytes"])["upload_bytes"] == list(range(total))


def test_a_hanging_server_blocks_no_longer_than_the_time_limit(folder: Path, hanging_server: str) -> None:
    run_dir = folder / "run"
    config = make_run(run_dir, make_config(uri=hanging_server, flush_timeout_s=1.0))
    follower = MlflowTracker(RunFolder(run_dir), config)
    started = time.monotonic()
    follower.on_resume([])
    assert time.monotonic() - started < 0.5
    time.sleep(0.2)
    started = time.monotonic()
    (warning,) = follower.on_end("FINISHED")
    assert time.monotonic() - started < 1.5
    assert f"MLflow at {hanging_server} did not receive" in warning
    for missing in ("records", "the end of the run", "summary.json", "model"):
        assert missing in warning


def test_an_unfinished_run_is_sent_as_killed(folder: Path) -> None:
    run_dir = folder / "run"
    config = make_run(run_dir, finished=False)
    assert send_run(RunFolder(run_dir), config) == []
    assert only_run(folder).info.status == "KILLED"


def test_no_warnings_for_a_run_that_never_began(folder: Path) -> None:
    run_dir = folder / "run"
    run_dir.mkdir()
    assert MlflowTracker(RunFolder(run_dir), make_config()).on_end("FAILED") == []


def test_the_uri_comes_from_config_then_environment_then_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(make_config(uri="http://config").tracking, tmp_path / "run") == "http://config"
    assert tracking_uri(make_config().tracking, tmp_path / "run") == "http://environment"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(make_config().tracking, Path("run")) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_protocol_in_the_environment_that_mlflow_does_not_know_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://ada:secret@host/store")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI = 'ftp://\*\*\*@host/store'.*protocol 'ftp'"):
        sylva_ray.run(make_config(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_a_plug_in_tracked_can_be_read_without_the_plug_in(tmp_path: Path) -> None:
    """`repair` would otherwise take its configuration for damaged, and write another."""
    config = make_config(uri="azureml://host/store")
    with pytest.raises(UserError, match=r"tracking\.uri = 'azureml://host/store'.*protocol 'azureml'"):
        sylva_ray.run(config, out=tmp_path / "run")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert RunFolder(tmp_path).load_config().tracking.uri == "azureml://host/store"


def test_a_protocol_in_capital_letters_is_the_same(tmp_path: Path) -> None:
    assert tracking_uri(make_config(uri="HTTPS://host").tracking, tmp_path / "run") == "HTTPS://host"


def test_metric_names_and_values_of_a_record() -> None:
    record = {
        "step": 4,
        "stage": "phase1",
        "round": 4,
        "epsilon": None,
        "lr": 0.1,
        "participants": [0, 2],
        "missing": [2],
        "metrics": {"loss": {"0": 1.0, "2": 3.0}},
        "evaluation": {
            "benign": {"accuracy": [0.5, 1.0], "balanced_accuracy": [0.25, 0.75], "one_class": [0.0, 0.0]},
            "pgd20-eps8": {"accuracy": [0.0, 0.5], "balanced_accuracy": [0.0, 0.5]},
            "pgd20-eps255": {"accuracy": [0.0, 0.0], "balanced_accuracy": [0.0, 0.0]},
        },
        "upload_bytes": 10,
        "download_bytes": 20,
        "seconds": {"train": 1.5},
    }
    values = record_metrics(StageRecord.from_json(record, "here"), ["pgd20-eps8"])
    assert next(iter(values)) == "robust_accuracy/pgd20-eps8/mean", "what MLflow's comparison page opens with"
    assert "epsilon" not in values
    expected = {
        "lr": 0.1,
        "num_participants": 2,
        "num_missing": 1,
        "upload_bytes": 10,
        "download_bytes": 20,
        "seconds/train": 1.5,
        "loss/mean": 2.0,
        "client_000/loss": 1.0,
        "client_002/loss": 3.0,
        "benign_accuracy/mean": 0.75,
        "benign_accuracy/std": 0.25,
        "benign_accuracy/min": 0.5,
        "benign_accuracy/p10": 0.55,
        "client_001/benign_accuracy": 1.0,
        "benign_balanced_accuracy/min": 0.25,
        "robust_accuracy/pgd20-eps8/mean": 0.25,
        "client_001/robust_accuracy/pgd20-eps8": 0.5,
        "check_accuracy/pgd20-eps255/mean": 0.0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert not [name for name in values if name.startswith("robust") and "eps255" in name]

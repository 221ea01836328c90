"""A run folder at a URL: who goes on with it, wherever and whenever the last push was cut, gets the same adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from sylva_ray import api
from sylva_ray.cli import app
from sylva_ray.core.errors import Interrupted, RunError, UserError
from sylva_ray.core.records import StageRecord
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.observer import Observer
from sylva_ray.preparation.experiment import Prepared, create_worker
from sylva_ray.storage.checkpoint import CheckpointFolder
from sylva_ray.storage.manifest import MANIFEST
from sylva_ray.storage.remote_copy import RemoteFolder, run_folder_at
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place of each kind: one that forgets, one whose writes are not one step, and moto's S3 on the loopback."""
    if request.param == "file":
        yield (tmp_path / "shared" / "run").as_uri()
    elif request.param == "memory":
        yield "memory://bucket/run"
        fsspec.filesystem("memory").store.clear()
    else:
        pytest.importorskip("s3fs")
        moto = pytest.importorskip("moto.server")
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "us-east-1")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        bucket = f"bucket-{len(str(tmp_path))}-{abs(hash(tmp_path))}"  # moto's buckets outlive its servers
        s3fs.S3FileSystem().mkdir(bucket)
        yield f"s3://{bucket}/runs/a"
        server.stop()


def save_steps(folder: RemoteFolder, *steps: int) -> None:
    """Checkpoints of a toy, and the records up to then, each step pushed."""
    folder.local.mkdir(parents=True, exist_ok=True)
    (folder.local / "config.yaml").write_text("name: toy\n")
    for step in steps:
        CheckpointFolder(folder.local / "checkpoint").save(step, [{"a": np.full(4, step, np.float32)}], [], None)
        (folder.local / "rounds.jsonl").write_text("{}\n" * (step + 1))
        folder.push()


def cut_at(folder: RemoteFolder, last: str, error: BaseException) -> None:
    """Let every push end with ``error`` before the file ``last`` is sent."""
    send = folder._send

    def cut(name: str, path: Path) -> None:
        if name == last:
            raise error
        send(name, path)

    folder._send = cut  # type: ignore[method-assign]


def newest(folder: RemoteFolder) -> int:
    checkpoint = CheckpointFolder(folder.local / "checkpoint").latest()
    assert checkpoint is not None
    return checkpoint.step


def test_another_machine_gets_the_newest_checkpoint_and_the_url_keeps_few(url: str, tmp_path: Path) -> None:
    here, there = RemoteFolder(url, tmp_path / "here"), RemoteFolder(url, tmp_path / "there")
    here.start()
    save_steps(here, 0, 1, 2, 3, 4)
    there.pull()
    assert newest(there) == 4
    folders = [sorted(path.name for path in (f.local / "checkpoint").iterdir()) for f in (here, there)]
    assert folders[0] == folders[1] == ["round_0002", "round_0003", "round_0004"]


def test_a_push_that_is_cut_leaves_the_checkpoint_before(url: str, tmp_path: Path) -> None:
    """The manifest goes last: without it the newest checkpoint does not count, and nothing older has gone yet."""
    here, there = RemoteFolder(url, tmp_path / "here"), RemoteFolder(url, tmp_path / "there")
    save_steps(here, 0, 1, 2)
    cut_at(here, f"checkpoint/round_0003/{MANIFEST}", OSError("the network is down"))
    with pytest.raises(RunError, match=r"could not be written \(the network is down\)"):
        save_steps(here, 3)
    there.pull()
    assert newest(there) == 2


def test_stages_that_are_on_this_machine_alone_are_not_pulled_away(url: str, tmp_path: Path) -> None:
    """Small files arrive and large ones do not (a quota): the records say nothing of the checkpoints."""
    here = RemoteFolder(url, tmp_path / "here")
    save_steps(here, 0)
    cut_at(here, "checkpoint/round_0001/states.safetensors", OSError("quota exceeded"))
    with pytest.raises(RunError, match="quota exceeded"):
        save_steps(here, 1)
    again, there = RemoteFolder(url, here.local), RemoteFolder(url, tmp_path / "there")
    there.pull()
    assert newest(there) == 0
    again.pull()
    assert newest(again) == 1
    save_steps(again, 2)
    there.pull()
    assert newest(there) == 2


def test_a_coordinator_replaces_a_damaged_checkpoint_that_its_driver_has_pulled(url: str, tmp_path: Path) -> None:
    """They are two processes: what the first one fetched, the second one must not take for what it computes."""
    driver = RemoteFolder(url, tmp_path / "here")
    save_steps(driver, 0, 1)
    name = "checkpoint/round_0001/states.safetensors"
    content = bytearray(driver._files.cat_file(driver._remote_path(name)))
    content[-1] ^= 255
    driver._files.pipe_file(driver._remote_path(name), bytes(content))
    RemoteFolder(url, tmp_path / "here").pull()
    coordinator, there = RemoteFolder(url, tmp_path / "here"), RemoteFolder(url, tmp_path / "there")
    assert newest(coordinator) == 0
    save_steps(coordinator, 1)
    there.pull()
    assert newest(there) == 1


def test_a_file_that_a_repair_set_aside_is_not_at_the_url_either(url: str, tmp_path: Path) -> None:
    here = RemoteFolder(url, tmp_path / "here")
    here.local.mkdir()
    (here.local / "evaluation.json").write_text("{")
    save_steps(here, 0)
    (here.local / "evaluation.json").rename(here.local / "evaluation.json.damaged")
    again = RemoteFolder(url, here.local)
    again.push()
    there = RemoteFolder(url, tmp_path / "there")
    there.pull()
    assert (there.local / "evaluation.json.damaged").exists()
    assert not (there.local / "evaluation.json").exists()


def test_a_file_url_is_the_folder_that_other_commands_mean(tmp_path: Path) -> None:
    save_steps(RemoteFolder((tmp_path / "a b").as_uri(), tmp_path / "here"), 0)
    assert (tmp_path / "a b" / "config.yaml").exists()
    assert not (tmp_path / "a%20b").exists()


def test_rows_that_checkpoints_share_are_sent_once_and_fetched_once(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six clients of whom one changes with each step: what the first step wrote stays in use."""
    here, there = RemoteFolder(url, tmp_path / "here"), RemoteFolder(url, tmp_path / "there")
    sent: list[str] = []
    send = here._send

    def counted(name: str, path: Path) -> None:
        assert here._remote_sizes is not None
        if name not in here._remote_sizes:
            sent.append(name)
        send(name, path)

    monkeypatch.setattr(here, "_send", counted)
    rng, stored = np.random.default_rng(0), None
    states = [{"a": rng.normal(size=4).astype(np.float32)} for _ in range(6)]
    here.local.mkdir(parents=True)
    (here.local / "config.yaml").write_text("name: toy\n")
    for step in range(4):
        states[step] = {"a": np.full(4, step, np.float32)}
        checkpoints = CheckpointFolder(here.local / "checkpoint")
        stored = checkpoints.save(step, states, [], None, before=stored)
        assert stored is not None
        states = [dict(state) for state in stored.states]
        here.push()
    rows = [name for name in sent if "rows_" in name or "states" in name]
    assert rows == [f"checkpoint/round_{step:04d}/states.safetensors" for step in range(4)]
    there.pull()
    found = CheckpointFolder(there.local / "checkpoint").latest()
    assert found is not None
    for one, other in zip(found.states, states, strict=True):
        np.testing.assert_array_equal(one["a"], other["a"])
    last, before = (there.local / "checkpoint" / f"round_{step:04d}" for step in (3, 2))
    assert (last / "rows_0000.safetensors").samefile(before / "rows_0000.safetensors")
    assert (last / "rows_0002.safetensors").samefile(before / "states.safetensors")


def save_rows(folder: RemoteFolder, value: float, *steps: int) -> None:
    """Go on from the newest checkpoint with steps that each change one of six clients, and push each."""
    folder.local.mkdir(parents=True, exist_ok=True)
    (folder.local / "config.yaml").write_text("name: toy\n")
    checkpoints = CheckpointFolder(folder.local / "checkpoint")
    found = checkpoints.latest()
    stored = None if found is None else found.stored
    for step in steps:
        states = [{"a": np.full(4, i, np.float32)} for i in range(6)] if stored is None else stored.states
        states = [*states[:step], {"a": np.full(4, value + step, np.float32)}, *states[step + 1 :]]
        stored = checkpoints.save(step, states, [], None, before=stored)
        (folder.local / "rounds.jsonl").write_text("{}\n" * (step + 1))
        folder.push()


def flip_a_bit(folder: RemoteFolder, name: str) -> None:
    """Damage a file at the URL; its size stays."""
    path = folder._remote_path(f"checkpoint/{name}")
    content = bytearray(folder._files.cat_file(path))
    content[-1] ^= 1
    folder._files.pipe_file(path, bytes(content))


def values_at(url: str, local: Path) -> list[float]:
    """The clients of the newest checkpoint that another machine gets."""
    there = RemoteFolder(url, local)
    there.pull()
    found = CheckpointFolder(there.local / "checkpoint").latest()
    assert found is not None
    return [float(state["a"][0]) for state in found.states]


def test_a_damaged_checkpoint_is_replaced_before_others_share_its_rows(url: str, tmp_path: Path) -> None:
    save_rows(RemoteFolder(url, tmp_path / "here"), 100, 0, 1, 2)
    there = RemoteFolder(url, tmp_path / "there")
    flip_a_bit(there, "round_0002/states.safetensors")
    there.pull()
    save_rows(there, 100, 2, 3, 4)
    assert values_at(url, tmp_path / "third") == [100, 101, 102, 103, 104, 5]


def test_rows_of_a_push_that_was_cut_are_replaced_by_those_of_another_machine(url: str, tmp_path: Path) -> None:
    """Its processor may round otherwise: files of the same names and sizes then differ."""
    here, there = RemoteFolder(url, tmp_path / "here"), RemoteFolder(url, tmp_path / "there")
    save_rows(here, 100, 0, 1, 2)
    cut_at(here, f"checkpoint/round_0003/{MANIFEST}", OSError("the network is down"))
    with pytest.raises(RunError, match="the network is down"):
        save_rows(here, 100, 3)
    there.pull()
    save_rows(there, 200, 3, 4)
    assert values_at(url, tmp_path / "third") == [100, 101, 102, 203, 204, 5]


def test_damage_to_a_copy_of_rows_does_not_reach_the_other_checkpoints(tmp_path: Path) -> None:
    """A pull links files that the manifests call equal, but not to one that is damaged."""
    url = "memory://bucket/damage"
    here = RemoteFolder(url, tmp_path / "here")
    save_rows(here, 100, 0, 1, 2)
    flip_a_bit(here, "round_0000/states.safetensors")
    assert values_at(url, tmp_path / "there") == [100, 101, 102, 3, 4, 5]
    fsspec.filesystem("memory").store.clear()


def test_a_name_at_a_url_does_not_lead_out_of_the_local_copy(tmp_path: Path) -> None:
    """Keys of an object store are any text."""
    here = RemoteFolder("memory://bucket/names", tmp_path / "here")
    save_steps(here, 0)
    store = here._files.store
    store["/bucket/names/../../escaped.txt"] = store["/bucket/names/config.yaml"]
    there = RemoteFolder("memory://bucket/names", tmp_path / "a" / "there")
    there.pull()
    assert newest(there) == 0
    assert not list(tmp_path.rglob("escaped.txt"))
    store.clear()


def test_a_storage_that_cannot_copy_gets_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = RemoteFolder("memory://bucket/copies", tmp_path / "here")

    def cannot(*names: str) -> None:
        raise NotImplementedError

    monkeypatch.setattr(here._files, "cp_file", cannot)
    save_steps(here, 0, 1)
    there = RemoteFolder("memory://bucket/copies", tmp_path / "there")
    there.pull()
    assert newest(there) == 1


def test_a_folder_that_is_ahead_of_its_url_is_kept(url: str, tmp_path: Path) -> None:
    here = RemoteFolder(url, tmp_path / "here")
    save_steps(here, 0)
    (here.local / "rounds.jsonl").write_text("{}\n" * 3)
    here.pull()
    assert (here.local / "rounds.jsonl").read_text().count("\n") == 3


def test_a_resume_that_could_not_push_is_still_ahead(url: str, tmp_path: Path) -> None:
    """It writes the records of its checkpoint again, with the keys in another order: client 10 before client 2."""
    here = RemoteFolder(url, tmp_path / "here")
    save_steps(here, 0)
    records = here.local / "rounds.jsonl"
    records.write_text('{"step": 0, "metrics": {"2": 1.0, "10": 2.0}}\n')
    here.push()
    again = '{"metrics": {"10": 2.0, "2": 1.0}, "step": 0}\n{"step": 1}\n'
    records.write_text(again)
    here.pull()
    assert records.read_text() == again


def test_a_url_that_holds_something_is_refused(url: str, tmp_path: Path) -> None:
    here = RemoteFolder(url, tmp_path / "here")
    with pytest.raises(UserError, match="holds no run"):
        here.pull()
    save_steps(here, 0)
    with pytest.raises(UserError, match="already holds a run"):
        here.start()
    here._files.rm_file(f"{here._root}/config.yaml")
    with pytest.raises(UserError, match="is not empty"):
        here.start()


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143), Interrupted("interrupted")])
def test_what_an_evaluation_had_measured_when_it_was_stopped_is_at_the_url(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    url = (tmp_path / "shared").as_uri()
    save_steps(RemoteFolder(url), 0)

    def evaluate() -> None:
        with run_folder_at(url, "change") as (folder, _):
            folder.measurements.mkdir()
            (folder.measurements / "part").write_text("measured")
            raise stop

    with pytest.raises(type(stop)):
        evaluate()
    assert (tmp_path / "shared" / "evaluation" / "part").read_text() == "measured"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RemoteFolder("memory://bucket/other", tmp_path / "here")
    with folder.locked(), pytest.raises(UserError, match="is being used by process"), folder.locked():
        pass


@pytest.mark.parametrize("bad", ["gopher://run", "s4://bucket/run"])
def test_a_protocol_that_nobody_knows_is_refused(bad: str) -> None:
    with pytest.raises(UserError, match="is not a URL that can be used here"):
        RemoteFolder(bad)


# -- records of many clients, each with a file -------------------------------------------------------------------------


def many(step: int, loss: float = 1.0) -> StageRecord:
    """A record of so many clients that it has a file."""
    clients = list(range(300))
    losses = {str(client): loss + client for client in clients}
    return StageRecord(step=step, stage="phase1", round=step, participants=clients, metrics={"loss": losses})


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[RemoteFolder]:
    """A run of two stages, sent to its URL."""
    here = RemoteFolder("memory://bucket/many", tmp_path / "here")
    save_steps(here, 0, 1)
    RunFolder(here.local).write_records([many(0), many(1)])
    here.push()
    yield here
    fsspec.filesystem("memory").store.clear()


def records_at(shared: RemoteFolder, tmp_path: Path) -> list[StageRecord]:
    """What another machine reads at the URL."""
    there = RemoteFolder(shared.url, tmp_path / "there")
    shutil.rmtree(there.local, ignore_errors=True)
    there.pull()
    return RunFolder(there.local).load_records()


@pytest.mark.parametrize("num_sent", range(5))
def test_lines_at_a_url_have_their_files_wherever_a_push_is_cut(
    num_sent: int, shared: RemoteFolder, tmp_path: Path
) -> None:
    """A stage is computed again to another result, which takes one file away and adds two."""
    before, after = [many(0), many(1)], [many(0), many(1, loss=2.0), many(2)]
    RunFolder(shared.local).write_records(after)
    changes: list[str] = []

    def cut(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            if len(changes) == num_sent:
                raise OSError("the network is down")
            changes.append(arguments[0])
            return change(*arguments)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("pipe_file", "rm_file"):
            patch.setattr(shared._files, name, cut(getattr(shared._files, name)))
        try:
            shared.push()
        except RunError:
            assert num_sent < 4
    assert len(changes) == min(num_sent, 4), "two files, the records, and the file that no line names any more"
    assert records_at(shared, tmp_path) == (before if num_sent < 3 else after)
    shared.push()
    assert records_at(shared, tmp_path) == after
    assert len([name for name in shared._list() if name.startswith("clients/")]) == 3


def test_what_was_pulled_is_not_sent_back_and_what_was_repaired_is(shared: RemoteFolder, tmp_path: Path) -> None:
    name = next(name for name in shared._list() if name.startswith("clients/stage_0001"))
    content = shared._download(name)
    shared._files.pipe_file(shared._remote_path(name), bytes(len(content)))
    there = RemoteFolder(shared.url, tmp_path / "there")
    there.pull()
    sent: list[str] = []
    pipe = there._files.pipe_file

    def counted(path: str, content: bytes) -> None:
        sent.append(path)
        pipe(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(there._files, "pipe_file", counted)
        there.push()
        assert sent == []
        with pytest.raises(UserError, match="is damaged"):
            RunFolder(there.local).load_records()
        RunFolder(there.local).write_records([many(0), many(1)])
        there.push()
    assert there._remote_path(name) in sent
    assert shared._download(name) == content


def test_a_resume_with_another_pyarrow_that_could_not_push_is_still_ahead(shared: RemoteFolder) -> None:
    """The same values in other bytes have a file of another name."""
    folder = RunFolder(shared.local)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyarrow.parquet.write_table", partial(pq.write_table, use_dictionary=False))
        folder.write_records([many(0), many(1), many(2)])
    shared.pull()
    assert folder.load_records() == [many(0), many(1), many(2)]
    folder.write_records([many(0), many(1, loss=2.0), many(2)])
    with pytest.raises(UserError, match="is not the run whose copy"):
        shared.pull()


def test_a_stage_that_is_sent_during_a_pull_leaves_no_line_without_its_file(
    shared: RemoteFolder, tmp_path: Path
) -> None:
    there = RemoteFolder(shared.url, tmp_path / "there")
    listed = there._list

    def listed_then_pushed() -> dict[str, int]:
        names = listed()
        if len(RunFolder(shared.local).load_records()) == 2:
            RunFolder(shared.local).append_record(many(2))
            shared.push()
        return names

    there._list = listed_then_pushed  # type: ignore[method-assign]
    there.pull()
    assert RunFolder(there.local).load_records() == [many(0), many(1), many(2)]


# -- whole runs --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Somebody pulls the plug."""


def run_until(prepared: Prepared, remote: RemoteFolder, stop_after: int | None) -> None:
    """The experiment on this machine, until so many records are there."""
    RunFolder(remote.local).claim(prepared.config, resume=(remote.local / "config.yaml").exists())
    seen: list[StageRecord] = []

    class Watch(Observer):
        def on_record(self, record: StageRecord) -> None:
            seen.append(record)
            if len(seen) == stop_after:
                raise Stop

    pool = InProcessPool(create_worker(prepared.config, prepared.fleet, prepared.backbone))
    run_experiment(prepared, RunFolder(remote.local), pool, Watch(), remote)


def adapters(run_dir: Path) -> dict[str, bytes]:
    return {p.name + p.parent.name: p.read_bytes() for p in sorted((run_dir / "adapters").rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_to_the_same_adapters(tiny: Prepared, tmp_path: Path) -> None:
    """Two machines after one another, each without what the other had on its disk."""
    url = (tmp_path / "shared").as_uri()
    alone = RemoteFolder("memory://bucket/alone", tmp_path / "alone")
    run_until(tiny, alone, None)
    first = RemoteFolder(url, tmp_path / "first")
    with pytest.raises(Stop):
        run_until(tiny, first, 2)
    shutil.rmtree(first.local)
    second = RemoteFolder(url, tmp_path / "second")
    second.pull()
    run_until(tiny, second, None)
    third = RemoteFolder(url, tmp_path / "third")
    third.pull()
    assert adapters(third.local) == adapters(alone.local)
    assert (third.local / "summary.json").exists()


@pytest.mark.slow
def test_a_run_whose_first_push_was_cut_starts_again_with_one_record_per_stage(tiny: Prepared, tmp_path: Path) -> None:
    """The record of the warm-up is at the URL, the checkpoint after it is not."""
    url = (tmp_path / "shared").as_uri()
    first = RemoteFolder(url, tmp_path / "first")
    manifest = f"checkpoint/round_0000/{MANIFEST}"
    cut_at(first, manifest, Stop())
    with pytest.raises(Stop):
        run_until(tiny, first, 1)
    assert len((tmp_path / "shared" / "rounds.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "shared" / manifest).exists()
    second = RemoteFolder(url, tmp_path / "second")
    second.pull()
    run_until(tiny, second, None)
    for folder in (tmp_path / "shared", second.local):
        assert [record.step for record in RunFolder(folder).load_records()] == list(range(6))


def replaced_by_another_run(url: str, shared: Path, here: RemoteFolder) -> None:
    """Machine A, ``here``, has pushed seven stages; B has deleted them and pushed three stages of another run."""
    save_steps(here, *range(7))
    shutil.rmtree(shared)
    elsewhere = RemoteFolder(url, shared.with_name("elsewhere"))
    save_steps(elsewhere, 0, 1, 2)
    (elsewhere.local / "config.yaml").write_text("name: another\n")
    elsewhere.push()


@pytest.mark.parametrize("command", [api.load_run, api.report, api.resume])
def test_a_local_copy_of_another_run_is_neither_read_nor_pushed(
    command: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shared = tmp_path / "shared"
    here = RemoteFolder(shared.as_uri())
    replaced_by_another_run(shared.as_uri(), shared, here)
    before = {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"not the run whose copy is in {here.local}, with more stages; move"):
        command(shared.as_uri())
    assert {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()} == before
    shutil.rmtree(here.local)
    here.pull()
    assert (here.local / "config.yaml").read_text() == "name: another\n"


def test_a_local_copy_with_other_records_of_the_same_experiment_is_refused(tmp_path: Path) -> None:
    """Two machines have continued one run; which of them counts is for the user to say."""
    here = RemoteFolder((tmp_path / "shared").as_uri(), tmp_path / "here")
    save_steps(here, 0)
    (here.local / "rounds.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(UserError, match="is not the run whose copy"):
        here.pull()
    (here.local / "rounds.jsonl").write_text('{}\n{"torn')
    here.pull()
    assert (here.local / "rounds.jsonl").read_text() == "{}\n", "an incomplete line is no record"


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line in an empty home: ``call(...) -> (exit code, output, errors)``."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.mark.long
def test_every_command_takes_a_url(tiny: Prepared, tmp_path: Path, call: Callable[..., Any]) -> None:
    del tiny  # loaded once for all tests, so that this one is quick
    url = (tmp_path / "shared" / "run").as_uri()
    code, out, _ = call("run", "tiny.yaml", "--out", url, "--quiet")
    assert code == 0
    assert f"run      {url}" in out
    code, _, err = call("run", "tiny.yaml", "--out", url)
    assert code == 2
    assert "already holds a run" in err
    shutil.rmtree(tmp_path / "home")  # another machine
    assert call("run", url, "--resume", "--quiet")[0] == 0
    assert call("report", url)[:2] == (0, f"{url}/report.html\n")
    assert call("export", url, "--client", "1", "--to", "adapters")[0] == 0
    assert (tmp_path / "adapters" / "client_001").is_dir()
    assert call("compare", url)[0] == 0

"""Records of many clients: a short line and a Parquet file, which together are the record, however a write ended."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.records import StageRecord
from sylva_ray.storage import client_tables, run_folder
from sylva_ray.storage.client_tables import MAX_CLIENTS_IN_LINE, ClientTables
from sylva_ray.storage.repair import repair_run
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.federation.runs import bare_record

K = MAX_CLIENTS_IN_LINE + 1


def record(step: int = 0, clients: int = K, **content: Any) -> StageRecord:
    """A record of many clients; each value is another."""
    values = [(step + client) / 1000 for client in range(clients)]
    made: dict[str, Any] = {
        "step": step,
        "stage": "phase1",
        "round": step,
        "participants": list(range(clients)),
        "metrics": {"loss": {str(client): value for client, value in enumerate(values)}},
        "evaluation": {"pgd20-eps4": {"accuracy": values, "balanced_accuracy": values[::-1]}},
    }
    return StageRecord(**made | content)


def files(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.client_tables.folder.glob("*"))


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.records_file.read_text().splitlines()]


CASES: dict[str, dict[str, Any]] = {
    "everything": {
        "missing": [3, 7],
        "dropped": [9],
        "refused": {"4": "not finite", "10": "größer\nals erlaubt"},
        "neighbours": {"members": [[c, (c + 1) % K] for c in range(K)], "weights": [[0.25, 0.75]] * K},
        "seconds": {"wall": 1.5},
        "gpus": ["H100"],
        "extended_from": 4,
    },
    "few values": {"metrics": {"loss": {"5": 0.5}, "adapters_from_global": {}}, "evaluation": None},
    "not finite": {"metrics": {"loss": {"0": math.nan, "2": math.inf, "11": 1.0}}},
    "nobody took part": {"participants": [], "metrics": {}},
    "a panel": {
        "panel": list(range(0, 2 * K, 2)),
        "evaluation": {"benign": {"accuracy": [0.5] * K, "balanced_accuracy": [0.1] * K, "one_class": [0.0] * K}},
    },
    "a panel without an evaluation": {"panel": [1, K + 5], "evaluation": None},
    "no evaluation, no metrics": {"evaluation": None, "metrics": {}},
    "slashes in names": {
        "metrics": {"a/b": {"1": 0.5}},
        "evaluation": {"my/attack": {"accuracy": [0.5] * K, "balanced_accuracy": [0.25] * K}},
    },
    "rows of unequal length": {"neighbours": {"members": [[0], [], [2, 1]], "weights": [[1.0], [], [0.5, 0.5]]}},
    "a client named twice": {"missing": [3, 3, 1]},
    "keys of another version": {"words": "yes", "dropped": [2]},
    "a client without a number": {"metrics": {"loss": {"x": 1.0, "1": 2.0}}},
    "a number that is none of a client": {"metrics": {"loss": {"01": 1.0}}, "panel": [2**70], "evaluation": None},
    "text that is no Unicode": {"refused": {"1": "\ud800"}},
}


@pytest.mark.parametrize("case", CASES)
def test_records_come_back_as_they_were(case: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    written = [record(0, **CASES[case]), bare_record(1), record(2, **CASES[case])]
    folder.append_record(written[0])
    folder.write_records(written[:2])
    folder.append_record(written[2])
    loaded = folder.load_records()
    assert [json.dumps(one.to_json()) for one in loaded] == [json.dumps(one.to_json()) for one in written]
    if case != "not finite":
        assert loaded == written


CLIENTS = st.sets(st.integers(0, 6), max_size=5).map(sorted) | st.lists(st.integers(0, 6), max_size=3)
NUMBERS = st.floats()
NAMES = st.text(st.sampled_from("a/é-"), max_size=3)


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    """What a record may say of a few clients, in and out of order."""
    panel = draw(st.none() | CLIENTS)
    size = draw(st.integers(0, 4)) if panel is None else len(panel)
    values = st.lists(NUMBERS, min_size=size, max_size=size)
    accuracies = st.fixed_dictionaries(
        {"accuracy": values, "balanced_accuracy": values}, optional={"one_class": values}
    )
    rows = draw(st.lists(st.lists(st.integers(0, 6), max_size=3), max_size=4))
    content: dict[str, Any] = {
        "participants": draw(CLIENTS),
        "missing": draw(CLIENTS),
        "metrics": draw(
            st.dictionaries(NAMES, st.dictionaries(st.integers(0, 6).map(str) | NAMES, NUMBERS, max_size=3), max_size=2)
        ),
        "evaluation": draw(st.none() | st.dictionaries(NAMES, accuracies, max_size=2)),
        "refused": draw(st.none() | st.dictionaries(st.integers(0, 6).map(str), st.text(max_size=3), max_size=2)),
    }
    if panel is not None:
        content["panel"] = panel
    if draw(st.booleans()):
        weights = draw(st.lists(st.lists(NUMBERS, max_size=3), max_size=4))
        content["neighbours"] = {"members": rows, "weights": weights}
    return content


@settings(max_examples=50)
@given(contents())
def test_any_record_comes_back(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    before = StageRecord.model_validate({"step": 3, "stage": "x", "round": 3} | content)
    tables = ClientTables(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_tables, "MAX_CLIENTS_IN_LINE", -1)
        patch.setattr("os.fsync", lambda _: None)
        line = tables.stored(before.to_json())
    after = StageRecord.from_json(tables.restored(json.loads(json.dumps(line)), "line 1"), "line 1")
    assert json.dumps(after.to_json(), sort_keys=True) == json.dumps(before.to_json(), sort_keys=True)


def test_small_fleets_have_lines_that_say_everything(tmp_path: Path) -> None:
    folder, small = RunFolder(tmp_path), record(clients=MAX_CLIENTS_IN_LINE)
    folder.append_record(small)
    assert folder.records_file.read_text() == json.dumps(small.to_json()) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.jsonl"]


def test_a_line_says_what_a_round_did_and_the_file_what_clients_did(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    losses = {"2": 1.0, "4": 2.0, "5": math.inf}
    folder.append_record(
        record(participants=[2, 4, 5], missing=[5], metrics={"loss": losses, "none": {}}, refused={"4": "late"}, lr=0.1)
    )
    (line,), (name,) = lines(folder), files(folder)
    mean = (K - 1) / 2000
    means = line["client_table"].pop("means")
    assert line == {
        "step": 0,
        "stage": "phase1",
        "round": 0,
        "lr": 0.1,
        "client_table": {
            "file": f"clients/{name}",
            "counts": {"participants": 3, "missing": 1, "refused": 1},
        },
    }
    assert means == {
        "metrics/loss": 1.5,
        "metrics/none": None,
        "evaluation/pgd20-eps4/accuracy": pytest.approx(mean),
        "evaluation/pgd20-eps4/balanced_accuracy": pytest.approx(mean),
    }
    table = pq.read_table(folder.client_tables.folder / name)
    assert {field.name: str(field.type) for field in table.schema} == {
        "client": "int32",
        "participants": "bool",
        "missing": "bool",
        "refused": "string",
        "metrics/loss": "double",
        "metrics/none": "double",
        "evaluation/pgd20-eps4/accuracy": "double",
        "evaluation/pgd20-eps4/balanced_accuracy": "double",
    }
    assert table.num_rows == K
    assert table["metrics/loss"][:6].to_pylist() == [None, None, 1.0, None, 2.0, math.inf]
    assert table["participants"][:6].to_pylist() == [False, False, True, False, True, True]
    assert table["refused"][3:5].to_pylist() == [None, "late"]


def test_a_line_is_small_whatever_the_number_of_clients(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_record(record(clients=5_000))
    assert len(json.dumps(record(clients=5_000).to_json())) > 150_000
    assert len(folder.records_file.read_bytes()) < 600


def test_equal_records_have_equal_files_in_whatever_order_their_keys_are(tmp_path: Path) -> None:
    """As those of a checkpoint, which a resume writes again."""
    folder, first = RunFolder(tmp_path), record(metrics={"b": {"2": 1.0, "10": 2.0}, "a": {"1": 0.0}})
    folder.append_record(first)
    (path,) = folder.client_tables.folder.iterdir()
    before = path.stat()
    again = StageRecord.from_json(json.loads(json.dumps(first.to_json(), sort_keys=True)), "checkpoint")
    folder.write_records([again])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert files(folder) == [path.name]


# -- writes that end early ---------------------------------------------------------------------------------------------


def test_a_line_comes_after_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut before either write: no line without a file, and what is left of the file goes with the next resume."""
    folder = RunFolder(tmp_path)
    folder.append_record(record(0))

    def cut(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    for module, name in ((client_tables, "write_atomically"), (run_folder, "append_record")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, cut)
            with pytest.raises(OSError, match="no space"):
                folder.append_record(record(1))
        assert folder.load_records() == [record(0)]
    assert len(files(folder)) == 2
    folder.write_records(folder.load_records())
    assert len(files(folder)) == 1


def test_a_rewrite_removes_what_no_line_names_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_records([record(0), record(1), record(2)])
    first, *_ = files(folder)
    (folder.client_tables.folder / f".{first}").write_text("PAR1")
    (folder.client_tables.folder / "notes.txt").write_text("mine")
    folder.write_records([record(0), record(1, lr=0.5, metrics={})])
    assert [name.partition("-")[0] for name in files(folder)] == ["notes.txt", "stage_0000", "stage_0001"]
    assert folder.load_records() == [record(0), record(1, lr=0.5, metrics={})]
    folder.write_records([bare_record(0)])
    assert files(folder) == ["notes.txt"]
    (folder.client_tables.folder / "notes.txt").unlink()
    folder.write_records([bare_record(0)])
    assert not folder.client_tables.folder.exists()


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    """The file of another stage."""
    other = next(other for other in path.parent.iterdir() if other != path)
    path.write_bytes(other.read_bytes())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, r"is missing, and .*rounds\.jsonl, line 2 names it"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged, or not the file of"),
    "a bit": (flip, "is damaged, or not the file of"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged, or not the file of"),
    "of another stage": (swap, "is damaged, or not the file of"),
}


@pytest.fixture
def checkpointed(tmp_path: Path) -> RunFolder:
    """A run of two stages with many clients, whose checkpoint holds both records."""
    folder = RunFolder(tmp_path / "run")
    config = build(ExperimentConfig, TINY | {"partition": {"num_clients": 2}})
    folder.claim(config, False, Inputs(version="0.0.0", data={"train": "0"}, weights={"backbone": "0"}))
    records = [record(0), record(1)]
    draft = folder.checkpoints.begin(1, [{"head.bias": np.ones(3, np.float32)}] * 2)
    assert draft is not None
    folder.complete_checkpoint(config, draft, records, None, {})
    folder.write_records(records)
    return folder


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_is_not_what_was_written_is_named_and_repaired(case: str, checkpointed: RunFolder) -> None:
    damage, says = DAMAGE[case]
    path = next(checkpointed.client_tables.folder.glob("stage_0001*"))
    damage(path)
    with pytest.raises(UserError, match=says) as error:
        checkpointed.load_records()
    assert str(path) in str(error.value)
    assert f"sylva-ray repair {checkpointed}" in str(error.value)
    (done,) = repair_run(checkpointed)
    assert done == "rounds.jsonl: written again with the 2 records of round_0001"
    assert checkpointed.load_records() == [record(0), record(1)]
    assert repair_run(checkpointed) == []


def test_a_repair_removes_what_a_write_left(checkpointed: RunFolder) -> None:
    name = files(checkpointed)[0]
    (checkpointed.client_tables.folder / f".{name}").write_bytes(b"PAR1")
    assert repair_run(checkpointed) == [f".{name}: removed, a write that was interrupted"]


@pytest.mark.parametrize("reference", [7, {}, {"file": 3}, {"file": "../../x"}, {"file": "clients/../a.parquet"}])
def test_a_line_with_another_reference_is_refused(reference: object, checkpointed: RunFolder) -> None:
    content = lines(checkpointed)
    content[1]["client_table"] = reference
    checkpointed.records_file.write_text("".join(json.dumps(line) + "\n" for line in content))
    with pytest.raises(UserError, match=r"rounds\.jsonl, line 2"):
        checkpointed.load_records()
    assert len(repair_run(checkpointed)) == 1
    assert checkpointed.load_records() == [record(0), record(1)]


def test_a_file_of_another_form_is_refused_though_its_name_fits(checkpointed: RunFolder) -> None:
    """As somebody may write it who wants to mislead: Parquet of something else, or none."""
    content = lines(checkpointed)
    for wrong in (b"PAR1", client_tables._to_parquet({"participants": {1: True}})):
        name = client_tables._name(1, wrong)
        (checkpointed.client_tables.folder / name).write_bytes(wrong)
        content[1]["client_table"]["file"] = f"clients/{name}"
        checkpointed.records_file.write_text("".join(json.dumps(line) + "\n" for line in content))
        with pytest.raises(UserError, match=rf"{name}.*cannot be read .*sylva-ray repair"):
            checkpointed.load_records()

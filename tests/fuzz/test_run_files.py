"""Damaged files of runs and sweeps: a valid object, or one line; `repair` returns a run that opens, or says why not."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

import sylva_ray
from sylva_ray.api import LoadedRun
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.records import StageRecord
from sylva_ray.observers.mlflow.delivery import DeliveryState
from sylva_ray.storage.checkpoint import Checkpoint
from sylva_ray.storage.client_tables import MAX_CLIENTS_IN_LINE
from sylva_ray.storage.repair import repair_run
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.sweeps.folder import SweepFolder
from tests.conftest import TINY
from tests.federation.runs import bare_record
from tests.fuzz.outcome import outcome

OLD_RUN = Path(__file__).parents[1] / "storage" / "run_of_version_0_1"
NEWEST = "checkpoint/round_0001"
TABLE = "clients/stage_0001-*.parquet"


def many_clients(step: int) -> StageRecord:
    """A record that has a file."""
    clients = list(range(MAX_CLIENTS_IN_LINE + 1))
    return StageRecord(step=step, stage="phase1", round=step, participants=clients, metrics={"loss": {"1": 0.5}})


@cache
def template() -> Path:
    """A run folder with every file, of two clients and two stages; the last record says that there were more."""
    folder = RunFolder(Path(tempfile.mkdtemp()) / "run")
    config = build(ExperimentConfig, TINY | {"partition": {"num_clients": 2}})
    folder.claim(config, False, Inputs(version="0.0.0", data={"train": "0"}, weights={"backbone": "0"}))
    states = [
        {"head.bias": np.full(3, client, np.float32), "head.weight": np.ones((3, 2), np.float32)} for client in (0, 1)
    ]
    for step in (0, 1):
        records = [bare_record(0), many_clients(1)][: step + 1]
        draft = folder.checkpoints.begin(step, states)
        assert draft is not None
        folder.complete_checkpoint(config, draft, records, None, {1: {"head.bias": np.ones(3, np.float32)}})
        folder.append_record(records[-1])
    for name in ("summary.json", "evaluation.json"):
        shutil.copy(OLD_RUN / name, folder.path / name)
    folder.log_missing(1, [0])
    DeliveryState(folder.tracking_file, "sqlite:///mlflow.db").update(records_sent=1)
    return folder.path


@contextmanager
def run_folder() -> Iterator[RunFolder]:
    """A copy of the template for one example."""
    root = Path(tempfile.mkdtemp())
    try:
        yield RunFolder(shutil.copytree(template(), root / "run"))
    finally:
        shutil.rmtree(root)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        3,
        2**31,
        2**70,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "../x",
        "\n\x1b[31m",
        "a" * 5000,
        [],
        {},
        [None],
        {"": None},
        {"\n": 1},
        nested(200),
        [[]] * 50,
        "\ud800",
    ]
)


@st.composite
def changed_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Some values replaced, removed or added, somewhere in a JSON file."""
    root = [json.loads(content)]
    for _ in range(draw(st.integers(1, 3))):
        place: Any = root
        key: Any = 0
        for _ in range(draw(st.integers(0, 5))):
            child = place[key]
            keys = list(child) if isinstance(child, dict) else range(len(child)) if isinstance(child, list) else ()
            if not keys:
                break
            place, key = child, draw(st.sampled_from(list(keys)))
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "remove" and place is not root:
            del place[key]
        elif kind == "add" and isinstance(place[key], dict):
            place[key][draw(st.sampled_from(["", "step", "x", "\n", "é" * 300]))] = copy.deepcopy(draw(ODD))
        else:
            place[key] = copy.deepcopy(draw(ODD))
    return json.dumps(root[0]).encode()


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes replaced, inserted, cut off; or something else altogether."""
    odd = [
        b"",
        b"\x00" * 20,
        b"null",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b"1" * 5000,
        b"- 1\n",
        b"&a [*a]",
    ]
    kind = draw(st.sampled_from(["replace", "cut", "insert", "odd"]))
    place = draw(st.integers(0, max(0, len(content) - 1)) | st.integers(0, min(40, max(0, len(content) - 1))))
    if kind == "odd":
        return draw(st.sampled_from(odd))
    if kind == "cut":
        return content[:place]
    piece = draw(st.binary(min_size=1, max_size=8))
    return content[:place] + piece + content[place + (len(piece) if kind == "replace" else 0) :]


def damaged(draw: st.DrawFn, path: Path) -> bytes:
    content = path.read_bytes()
    is_json = path.suffix == ".json"
    return draw(changed_json(content) | changed_bytes(content) if is_json else changed_bytes(content))


def reseal(folder: Path) -> None:
    """Write a manifest for what a checkpoint holds now, as if it had been written so."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"step": 1, "sha256": sums}))


def check_opens(folder: RunFolder) -> LoadedRun | UserError:
    run = outcome(lambda: sylva_ray.load_run(folder.path), untouched=folder.path)
    if not isinstance(run, UserError):
        assert len(run.states) == run.config.partition.num_clients
        assert all(np.isfinite(value).all() for state in run.states for value in state.values())
    return run


FILES = (
    ["config.yaml", "inputs.json", "rounds.jsonl", "summary.json", "evaluation.json", "tracking.json", "missing.jsonl"]
    + [f"{NEWEST}/{name}" for name in ("manifest.json", "progress.json", "states.safetensors", "residuals.safetensors")]
    + [f"{NEWEST}/config.json", f"{NEWEST}/inputs.json"]
    + [TABLE]
)


@given(st.data(), st.sampled_from(FILES), st.booleans())
def test_a_damaged_file_of_a_run(data: st.DataObject, name: str, sealed: bool) -> None:
    """A reader, a resume and a repair; a checkpoint with checksums that fit, and with those of before."""
    with run_folder() as folder:
        (path,) = folder.path.glob(name)
        path.write_bytes(data.draw(st.composite(damaged)(path)))
        if sealed and name.startswith(NEWEST) and not name.endswith("manifest.json"):
            reseal(path.parent)
        check_opens(folder)
        newest = outcome(folder.checkpoints.latest, untouched=folder.path)
        assert isinstance(newest, Checkpoint | UserError)
        outcome(lambda: folder.load_missing(1), untouched=folder.path)
        outcome(lambda: DeliveryState.load(folder, "sqlite:///mlflow.db"), untouched=folder.path)
        repaired = outcome(lambda: repair_run(folder))
        if not isinstance(repaired, UserError):
            opened = check_opens(folder)
            assert not isinstance(opened, UserError), f"after {repaired}: {opened}"
            assert outcome(lambda: repair_run(folder)) == [], "nothing is left to repair"


DTYPES = st.sampled_from(["F32", "F64", "I64", "BOOL", "BF16", "F8_E4M3", "U8", "X", "", 1])
NUMBERS = st.sampled_from([-1, 0, 1, 2, 12, 24, 2**31, 2**60, 2**64, None, "1", 0.5])


@given(
    st.dictionaries(
        st.sampled_from(["head.bias", "head.weight", "", "../x", "\n", "__metadata__"]),
        st.fixed_dictionaries(
            {"dtype": DTYPES, "shape": st.lists(NUMBERS, max_size=3), "data_offsets": st.lists(NUMBERS, max_size=3)}
        ),
        max_size=3,
    ),
    st.sampled_from([None, 0, 7, 2**31, 2**60, 2**64 - 1]),
    st.sampled_from([0, 1, 24, 1000]),
)
def test_a_header_of_safetensors(header: dict[str, Any], length: int | None, size: int) -> None:
    """Whatever it claims, nothing is allocated that the file does not have."""
    text = json.dumps(header).encode()
    content = (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)
    with run_folder() as folder:
        for name in ("states.safetensors", "residuals.safetensors"):
            (folder.path / NEWEST / name).write_bytes(content)
            reseal(folder.path / NEWEST)
            check_opens(folder)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "bool", "complex64"])
def test_arrays_of_other_types(dtype: str) -> None:
    with run_folder() as folder:
        for arrays in ({"x": np.ones((2, 3), dtype)}, {"x": np.ones((), dtype)}, {"x": np.ones((0, 3), dtype)}, {}):
            try:
                content = save(arrays)
            except KeyError:  # a type that the format does not have
                continue
            (folder.path / NEWEST / "states.safetensors").write_bytes(content)
            reseal(folder.path / NEWEST)
            check_opens(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", ["folder", "pipe", "loop"])
def test_what_is_no_file(name: str, make: str) -> None:
    import os

    makers: dict[str, Callable[[Path], object]] = {
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
        "loop": lambda path: path.symlink_to(path),
    }
    with run_folder() as folder:
        (path,) = folder.path.glob(name)
        path.unlink()
        makers[make](path)
        check_opens(folder)
        outcome(lambda: folder.load_missing(1), untouched=folder.path)
        outcome(lambda: DeliveryState.load(folder, "sqlite:///mlflow.db"), untouched=folder.path)


SPACE = """
name: toy
experiment: {name: toy}
seeds: [0]
parameters:
  lora.rank: {grid: [1, 2]}
objectives: [{metric: final.benign, mode: max}]
"""
HISTORY = b'{"began": 1.0, "process": 3, "node": "a"}\n{"began": 1.0, "step": 0}\n{"began": 1.0, "outcome": "died"}\n'


@given(st.data())
def test_files_of_a_sweep(data: st.DataObject) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        folder = SweepFolder(root)
        (root / "attempts").mkdir()
        folder.space.write_bytes(data.draw(changed_bytes(SPACE.encode())))
        lines = HISTORY.splitlines()
        lines[data.draw(st.integers(0, 2))] = data.draw(changed_json(lines[0]) | changed_bytes(lines[0]))
        (root / "attempts" / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        outcome(folder.load, untouched=root)
        outcome(lambda: folder.history("a"), untouched=root)
    finally:
        shutil.rmtree(root)
